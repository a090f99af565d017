"""What a run records of the files outside its folder, so that they are found from anywhere and known again.

Paths are recorded absolute, whatever they were relative to when the run began. Of the base the run also keeps the
fingerprint of its weights and the fields of its configuration: a base that has moved can be told from another one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.data import DataError, parse_source
from mor_jax.data.sources import HUB_PREFIX
from mor_jax.models import DecoderConfig, ModelConfig
from mor_jax.training.adapter_file import AdapterFileError
from mor_jax.training.checkpoint import fingerprint
from mor_jax.training.config import TrainConfig

# fields that decide how the same function is computed, or where training begins, or nothing
_HOW = {"dtype", "param_dtype", "scan_layers", "remat", "attention_block", "attention_implementation"}
_HOW |= {"initializer_range", "max_position_embeddings"}


def expanded_path(path: str | os.PathLike) -> str:
    """The path with the home folder in place of a leading `~`; in `--model=~/base` and in YAML no shell replaces it."""
    text = os.fspath(path)
    return os.path.expanduser(text) if text.startswith("~") and not os.path.lexists(text) else text


def absolute_path(path: str | os.PathLike) -> str:
    """The same file from any working directory; links stay, so that what they lead to may be exchanged."""
    text = expanded_path(path)
    plain = os.path.abspath(text)
    if os.path.exists(text) and not (os.path.exists(plain) and os.path.samefile(text, plain)):
        return str(Path(text).absolute())  # a `..` behind a link is not the folder that the link lies in
    return plain


def expanded(config: TrainConfig) -> TrainConfig:
    """The configuration with the home folder in place of every leading `~`."""
    return _with_paths(config, expanded_path)


def located(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths; a model or data that is no file, such as a hub dataset, stays as it is."""
    return _with_paths(config, absolute_path)


def _with_paths(config: TrainConfig, change: Any) -> TrainConfig:
    def source(text: str) -> str:
        try:
            found = parse_source(text)
        except DataError:  # of a run whose records are its own affair
            return text
        path = change(found.path)
        if found.path.startswith(HUB_PREFIX) or not os.path.exists(path):
            return text
        task = f"{found.task}=" if text != found.path and text.startswith(f"{found.task}=") else ""
        return f"{task}{path}" + ("" if found.weight == 1 else f":{found.weight!r}")

    model = change(config.model) if config.model else ""
    return dataclasses.replace(
        config,
        model=model if os.path.exists(model) else config.model,
        data=tuple(source(text) for text in config.data),
        eval_data=tuple(source(text) for text in config.eval_data),
        output_dir=change(config.output_dir),
        compile_cache=change(config.compile_cache) if config.compile_cache else "",
    )


def describe_base(model: Any) -> dict[str, Any]:
    """{"base_config": ...}: what JSON holds of the configuration of a decoder or encoder; {} for other models."""
    config = getattr(model, "config", None)
    return {"base_config": _fields(config)} if isinstance(config, ModelConfig) else {}


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _HOW}
    if isinstance(config, DecoderConfig):  # several spellings of the same windows
        del fields["sliding_window"], fields["sliding_layers"]
        fields["windows"] = config.windows
    return json.loads(json.dumps(fields))


def check_base_config(where: str, metadata: Mapping[str, Any], config: Any) -> None:
    """Returns when `config` describes the base that a run was trained on, as far as the run tells.

    Args:
      where: the base's directory and the run's, for the message.
      metadata: fields of `adapter.json`, or of a checkpoint.
      config: of the base, with the run's own head; that of another model is not looked at.

    Raises:
      AdapterFileError: it is another one; the message names the field.
    """
    recorded = metadata.get("base_config", {})
    found = _fields(config) if isinstance(config, ModelConfig) else {}
    for name in sorted(found.keys() & recorded.keys(), key=lambda name: (name != "model_type", name)):
        if found[name] != recorded[name]:
            raise AdapterFileError(
                f"{where}: its config.json gives {name}={found[name]!r}, and the run was trained with"
                f" {recorded[name]!r}: give the run's own base by --model DIR"
            )


def check_base_weights(where: str, metadata: Mapping[str, Any], params: Any) -> None:
    """Returns when `params`, in the dtype of the training, are those that an adapter was trained on.

    Raises:
      AdapterFileError: they are others.
    """
    recorded = metadata.get("base_fingerprint")
    if recorded is not None and recorded != fingerprint(params):
        raise AdapterFileError(
            f"{where}: its weights are not those that the run was trained on: give the run's own base by --model DIR"
        )
