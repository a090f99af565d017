"""A merged model as a Hugging Face directory: config, tokenizer, sharded safetensors, fidelity, manifest last."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor_jax.merging import FidelityReport
from mor_jax.models import ModelConfig, save_params
from mor_jax.processes import barrier, is_first
from mor_jax.training.integrity import write_manifest

MAX_SHARD_BYTES = 5_000_000_000


def export_hf(
    params: dict,
    config: ModelConfig,
    directory: str | os.PathLike,
    *,
    source_dir: str | os.PathLike | None = None,
    report: FidelityReport | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str | None = None,
    stop_tokens: Sequence[int] = (),
) -> Path:
    """Writes a model that `transformers` loads; of several processes all must call this, and the first writes.

    Args:
      params: the merged parameter tree, from `merge` or `merge_routed`.
      config: its config.
      directory: to be made; must not exist, or be empty.
      source_dir: the base's own directory: its `config.json`, tokenizer and generation defaults are carried over, and
        each tensor is written in the dtype that it has there.
      report: saved as `fidelity.json`.
      max_shard_bytes: files larger than this are split and get an index.
      dtype: of all tensors instead; see `save_params`.
      stop_tokens: what generation ends at, of `Tokenization.stop`; `generation_config.json` says so where the base's
        own files say otherwise. Empty leaves those as they are.

    Returns:
      Path of the folder. Its manifest is written last: a folder without one is unfinished.

    Raises:
      FileExistsError: `directory` is there and not empty.
      ModelFileError: `source_dir` describes another model, or has a file that cannot be carried over.
      DtypeRangeError: a number does not fit into float16.
    """
    target = Path(directory)
    save_params(params, config, target, source_dir=source_dir, max_shard_bytes=max_shard_bytes, dtype=dtype)
    if is_first():
        if stop_tokens:
            _write_stop_tokens(target, sorted(stop_tokens))
        if report is not None:
            report.save(target)
        write_manifest(target)
    barrier("the manifest is there")
    return target


def _write_stop_tokens(folder: Path, stop_tokens: list[int]) -> None:
    """Names the tokens that end generation where transformers, and we, look for them."""
    own, config = folder / "generation_config.json", json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
    if own.is_file():
        found = json.loads(own.read_text(encoding="utf-8"))
    ends = found.get("eos_token_id", config.get("eos_token_id"))
    if sorted(ends if isinstance(ends, list) else [] if ends is None else [ends]) != stop_tokens:
        found["eos_token_id"] = stop_tokens if len(stop_tokens) > 1 else stop_tokens[0]
        own.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
