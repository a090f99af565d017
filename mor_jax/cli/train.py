"""`mor train`: a configuration file with flags laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.cli.launch import on_all
from mor_jax.cli.options import LaunchOptions
from mor_jax.cli.paths import WRITTEN, check_makeable
from mor_jax.training.config import ConfigError, TrainConfig, config_from_mapping, config_to_mapping, load_config


def train_config(path: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration file at `path` with the given flags laid over it.

    `RUN/config.yaml --resume` goes on with the run in that folder. A `.yaml` at the end of `--data` is the file: no
    data has that ending, and a list of paths takes what follows it.

    Raises:
      ConfigError: a field is wrong, or `model` or `data` is missing.
    """
    given = dict(given)
    data = list(given.get("data", ()))
    if path is None and len(data) > 1 and data[-1].endswith((".yaml", ".yml")):
        path, given["data"] = data[-1], data[:-1]
    fields = config_to_mapping(load_config(path)) if path else {}
    if path and given.get("resume") and "output_dir" not in given and (Path(path).parent / "metrics.jsonl").is_file():
        given["output_dir"] = str(Path(path).parent)  # the run that the file lies in, wherever it was moved
    config = config_from_mapping(fields | given, "command line")
    for name, remedy in (("model", "a Hugging Face directory"), ("data", "at least one file of records")):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing: give {remedy}")
    return config


def train_command(path: str | None, given: Mapping[str, Any], launch: LaunchOptions) -> dict[str, Any] | None:
    """Trains; returns `steps`, `loss`, `trainable_parameters`, `tokens_per_second` and what `train` adds.

    Of several processes all but the first return None.

    Raises:
      ConfigError, UsageError, DataError, ModelFileError, InjectionError: bad input; nothing has been written.
      DistributedError, LostPeerError: the other processes cannot be joined, or are gone.
    """
    config = train_config(path, given)
    for name in WRITTEN:
        if getattr(config, name):
            check_makeable(
                getattr(config, name), f"--{name.replace('_', '-')}", writable=False
            )  # the first process does
    return on_all(launch, lambda: _train(config))


def _train(config: TrainConfig) -> dict[str, Any]:
    from mor_jax.training.loop import train  # after the checks: a wrong field need not wait for jax

    return train(config)
