"""The run folder: what is in it, when it may be written, and whether a checkpoint in it belongs to this run.

config.yaml         the resolved configuration, its paths absolute
environment.json    versions, devices and git commit of the process that wrote last
metrics.jsonl       a line a step; TensorBoard events beside it
checkpoints/        of `Checkpoints`
adapter/            of `save_adapter`, when all steps are done

Nothing is written before model, data and configuration have passed every check and the step has compiled.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import mor_jax
from mor_jax.training.checkpoint import Checkpoints
from mor_jax.training.config import ConfigError, TrainConfig, config_to_mapping, save_config
from mor_jax.training.distributed import first_decides
from mor_jax.training.recorded_base import located

_LOGGER = logging.getLogger(__name__)
_PACKAGES = ("mor_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers")

# May differ between a run and its continuation: they decide what is written and where, not what is trained.
_FREE = {
    "output_dir",
    "resume",
    "save_every",
    "keep_checkpoints",
    "eval_data",  # but for what events score on, of which `check_same_score_batch` tells
    "eval_every",
    "eval_batches",
    "log_every",
    "compile_cache",
}
_CONTENT = {
    "model",
    "data",
    "labels",
}  # may have moved, or been found in the data: the fingerprint and the packing plan tell whether they are the same
_DECIDED = {"chat_date", "start_tokens", "end_tokens", "stop_tokens"}  # once a run, and kept; see `data.tokenization`
_ROUNDING = {"mesh", "remat", "loss_chunk", "attention_implementation"}  # the same mathematics in another order


class Start(NamedTuple):
    """The checkpoints of a run folder, and the (step, metadata) of the one to go on from."""

    checkpoints: Checkpoints
    newest: tuple[int, dict[str, Any]] | None


def find_start(config: TrainConfig, custom_optimizer: bool) -> Start:
    """Where a run begins; reads no model, writes nothing, and raises as the two checks below.

    Raises:
      ConfigError: the newest good checkpoint is of a later step than the run's last.
    """
    first_decides(lambda: check_output_dir(config))
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config.keep_checkpoints)
    newest = checkpoints.newest() if config.resume else None
    if newest is not None:
        done, saved = newest
        check_same_run(config, saved, custom_optimizer)
        if done > config.steps:
            raise ConfigError(f"steps={config.steps}: the checkpoint is of step {done}: give at least that")
    return Start(checkpoints, newest)


def check_output_dir(config: TrainConfig) -> None:
    """Returns when the run may write to its folder.

    Raises:
      ConfigError: the folder holds something and the run is not told to resume, or the path is a file.
    """
    directory = Path(config.output_dir)
    where = f"output_dir={config.output_dir!r}"
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{where} is a file: give a folder")
    if directory.is_dir() and any(directory.iterdir()) and not config.resume:
        raise ConfigError(f"{where} exists and is not empty: go on with it by --resume, or choose another folder")


def check_same_run(config: TrainConfig, metadata: Mapping[str, Any], custom_optimizer: bool) -> None:
    """Returns when a checkpoint's configuration trains the same thing as `config`.

    Args:
      config: of the run that wants to go on.
      metadata: of the checkpoint.
      custom_optimizer: whether the optimiser was made in Python instead of named in `config`.

    Raises:
      ConfigError: a field that changes the result differs; names the field and both values.
    """
    saved, own = metadata["config"], config_to_mapping(config)
    fixed = own.keys() - _FREE - _CONTENT - _ROUNDING
    if (config.schedule == "constant" or custom_optimizer) and _same_rules(config, int(saved["steps"])):
        fixed -= {"steps"}  # no step before the last depends on how many there will be
    for name in own:
        if name in saved and saved[name] != own[name] and not (name in _DECIDED and own[name] in (None, "")):
            if name in fixed:
                raise ConfigError(
                    f"{name}={own[name]!r}: the checkpoint was trained with {saved[name]!r}: resume with that, or start"
                    " a new run in another output_dir"
                )
            if name in _ROUNDING:
                _LOGGER.warning("%s differs from the checkpoint's: equal to rounding, not bit for bit", name)
    if metadata["custom_optimizer"] != custom_optimizer:
        how = "made in Python" if metadata["custom_optimizer"] else "named in its configuration"
        raise ConfigError(f"optimizer: the checkpoint's was {how}: resume with the same one")


def with_decisions(config: TrainConfig, start: Start) -> TrainConfig:
    """The configuration with what the run decided about tokens before, where it goes on."""
    if start.newest is None:
        return config
    saved = start.newest[1]["config"]
    kept = {name: saved[name] for name in _DECIDED if getattr(config, name) in (None, "") and name in saved}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return dataclasses.replace(config, **kept)


def _same_rules(config: TrainConfig, steps: int) -> bool:
    """Whether what the methods do while training is the same in a run of that many steps."""
    methods = [config.adapter(), *(adapter for _, adapter in config.override_adapters())]
    return all(method.rules(config.steps) == method.rules(steps) for method in methods)


def check_same_base(config: TrainConfig, metadata: Mapping[str, Any], base_fingerprint: str) -> None:
    """Returns when the base in memory is the one that the checkpoint was trained on.

    Raises:
      ConfigError: it is another one.
    """
    if metadata["base_fingerprint"] != base_fingerprint:
        raise ConfigError(
            f"model={config.model!r}: its weights are not those that the checkpoint was trained on"
            f" ({metadata['config']['model']!r}): resume with the same base"
        )


def check_same_score_batch(config: TrainConfig, metadata: Mapping[str, Any], score_batch: str | None) -> None:
    """Returns when the events score on the batch that they scored on before the checkpoint, if on any.

    Raises:
      ConfigError: it is another one.
    """
    if metadata.get("score_batch") != score_batch:
        raise ConfigError(
            f"eval_data={list(config.eval_data)!r}: its first batch, which the events of a method score on, is"
            f" not that of the checkpoint ({metadata['config']['eval_data']!r}): resume with the same held-out data"
        )


def write_run_folder(config: TrainConfig) -> Path:
    """Makes the folder with `config.yaml` and `environment.json`, each written beside and renamed; returns its path."""
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / "config.yaml.tmp"
    save_config(dataclasses.replace(located(config), resume=False), beside)
    os.replace(beside, directory / "config.yaml")
    beside = directory / "environment.json.tmp"
    beside.write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")
    os.replace(beside, directory / "environment.json")
    return directory


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit of this package's checkout (None where it is installed without one)."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "machine": platform.platform(),
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this package is the top of; another project's around it would mislead."""
    root = Path(mor_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
