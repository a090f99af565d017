"""A merged model as a Hugging Face directory: config, tokenizer, sharded safetensors, fidelity, manifest last."""

from __future__ import annotations

import os
from pathlib import Path

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
        if report is not None:
            report.save(target)
        write_manifest(target)
    barrier("the manifest is there")
    return target
