"""Weights between a Hugging Face directory and a parameter tree, one tensor at a time.

One table (`tensors.py`) says which tensor is which leaf; loading and saving read it in the two directions.
Only safetensors are read: never pickle, never code from the directory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mor_jax.models.carried_files import carried_files, copy_files
from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.dtypes import DTYPES, STORED, as_written, check_dtype, common_dtype, dtype_fields, main_dtype
from mor_jax.models.hf_config import config_to_hf, read_config, same_model
from mor_jax.models.hf_encoder import LABEL_FIELDS
from mor_jax.models.hf_json import ModelFileError, read_json
from mor_jax.models.tensor_file import new_folder, save_tensors
from mor_jax.models.tensor_hints import HEAD, folder_hint, name_hint, shape_hint
from mor_jax.models.tensors import TensorEntry, check_shapes, common_name, is_derived, is_left_out, tensor_table
from mor_jax.processes import gathered

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")  # anything else is quantised, or no weight
_EMBEDDING = "model.embed_tokens.weight"
_LOGGER = logging.getLogger(__name__)


def _shard_files(directory: Path) -> dict[str, list[str] | None]:
    """File name -> the tensors that the index promises in it, None for a single file."""
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (directory / INDEX_FILE).is_file():
        raise ModelFileError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{folder_hint(directory)}")
    index = directory / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: field 'weight_map' must be an object of tensor name to file name")
    files: dict[str, list[str] | None] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file and file not in (".", "..")
        if not plain or not file.endswith(".safetensors"):
            raise ModelFileError(f"{index}: tensor {name!r} is said to be in {file!r}, which is no file name here")
        if not (directory / file).is_file():
            raise ModelFileError(f"{index}: tensor {name!r} is said to be in {file}, which is missing")
        promised = files.setdefault(file, [])
        assert promised is not None
        promised.append(name)
    return files


class _Checkpoint:
    """Open safetensors files of one directory; tensors are read slice by slice, by their `common_name`."""

    def __init__(self, directory: Path, config: ModelConfig, stack: ExitStack):
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._own_names: dict[str, str] = {}  # common name -> name in the file
        self.file_of: dict[str, str] = {}
        for file, promised in _shard_files(directory).items():
            try:
                opened = stack.enter_context(safe_open(directory / file, framework="np"))
            except SafetensorError as error:
                raise ModelFileError(f"{directory / file}: not a readable safetensors file ({error})") from None
            self._files[file] = opened
            names = set(opened.keys())
            if promised is not None and set(promised) != names:
                lost, more = sorted(set(promised) - names), sorted(names - set(promised))
                raise ModelFileError(f"{directory / file}: the index promises {lost} in vain and does not know {more}")
            for own in names:
                name = common_name(own, config)
                if name in self.file_of:
                    raise ModelFileError(f"{directory / file}: tensors {own} and {self._own_names[name]} are the same")
                self.file_of[name], self._own_names[name] = file, own

    def slices(self, name: str) -> Any:
        return self._files[self.file_of[name]].get_slice(self._own_names[name])

    def dtype(self, name: str) -> np.dtype:
        """Of the tensor as jax holds it."""
        return jnp.dtype(DTYPES[self.slices(name).get_dtype()])

    def check(self, table: list[TensorEntry], config: ModelConfig) -> None:
        expected = {entry.name for entry in table}
        missing = sorted(expected - set(self.file_of))
        if missing:
            hint = name_hint(self._own_names.values(), expected, config)
            raise ModelFileError(f"{self.directory}: {_listed(missing)} missing{hint}")
        extra = sorted(name for name in set(self.file_of) - expected if not is_derived(name))
        left_out = [name for name in extra if is_left_out(name, config)]
        if left_out:
            _LOGGER.warning("%s: %s left out: this model has no such module", self.directory, _listed(left_out))
        extra = [name for name in extra if name not in left_out]
        if isinstance(config, DecoderConfig) and config.tie_word_embeddings and HEAD in extra:
            self._check_tied_head()
            extra.remove(HEAD)
        if extra:
            hint = name_hint(self._own_names.values(), expected, config)
            raise ModelFileError(
                f"{self.directory}: {_listed(extra)} not part of a {config.model_type} of this config{hint}"
            )
        for entry in table:
            tensor = self.slices(entry.name)
            file, found = self.directory / self.file_of[entry.name], tuple(tensor.get_shape())
            if found != entry.shape:
                raise ModelFileError(
                    f"{file}: tensor {entry.name} has shape {found}, config.json asks for {entry.shape}"
                    f"{shape_hint(entry.name, found, entry.shape)}"
                )
            if tensor.get_dtype() not in _FLOATS:
                raise ModelFileError(
                    f"{file}: tensor {entry.name} is {tensor.get_dtype()}; only {', '.join(_FLOATS)} are weights"
                )

    def _check_tied_head(self) -> None:
        head, embedding = self.slices(HEAD), self.slices(_EMBEDDING)
        same = head.get_shape() == embedding.get_shape()
        rows, step = embedding.get_shape()[0], 4096
        pieces = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
        if not (same and all(np.array_equal(head[piece], embedding[piece]) for piece in pieces)):
            raise ModelFileError(
                f"{self.directory}: config.json ties the head to the embedding, but {HEAD} differs from {_EMBEDDING}"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"


def _read(source: Any, entry: TensorEntry, dtype: Any, index: Any) -> np.ndarray:
    """The part of a tensor that `index` (slices in our axis order) names, from disk."""
    where = index[::-1] if entry.transpose else index
    value = source[where] if where else source[:]
    return np.ascontiguousarray(value.T if entry.transpose else value, dtype)


def _layer_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of one row of a stacked leaf."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


@lru_cache(maxsize=64)
def _row_setter(sharding: jax.sharding.Sharding) -> Any:
    """(stacked, row, layer) -> stacked with the row in place, in the memory and sharding of the argument."""
    return jax.jit(
        lambda stacked, row, layer: jax.lax.dynamic_update_index_in_dim(stacked, row, layer, axis=0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _load_leaf(
    checkpoint: _Checkpoint, entries: list[TensorEntry], sharding: jax.sharding.Sharding, dtype: Any
) -> jax.Array:
    """One leaf in its sharding; a stacked one is filled row by row, in place."""

    def place(entry: TensorEntry, where: jax.sharding.Sharding) -> jax.Array:
        shape = entry.shape[::-1] if entry.transpose else entry.shape
        source = checkpoint.slices(entry.name)
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part get the same read

        def part(index: Any) -> np.ndarray:
            if str(index) not in parts:
                parts[str(index)] = _read(source, entry, dtype, index)
            return parts[str(index)]

        return jax.make_array_from_callback(shape, where, part)

    if entries[0].layer is None:
        return place(entries[0], sharding)
    rows = _layer_sharding(sharding)
    first = place(entries[0], rows)
    stacked = jnp.zeros((len(entries), *first.shape), dtype, device=sharding)
    for entry in entries:
        row = first if entry.layer == 0 else place(entry, rows)
        stacked = _row_setter(sharding)(stacked, row, jnp.int32(entry.layer))
        stacked.block_until_ready()  # at most one row lives beside the result
    return stacked


def _tree_get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _tree_set(tree: dict, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _by_leaf(table: list[TensorEntry]) -> Iterator[list[TensorEntry]]:
    leaves: dict[tuple[str, ...], list[TensorEntry]] = {}
    for entry in table:
        leaves.setdefault(entry.path, []).append(entry)
    yield from leaves.values()


def load_params(directory: str | os.PathLike, config: ModelConfig, shardings: Any = None, dtype: Any = None) -> dict:
    """The parameters in a Hugging Face directory, each tensor read straight into its shards.

    Args:
      directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.
      config: what `read_config(directory)` gave; `scan_layers` decides between stacked and per-layer leaves.
      shardings: pytree of `jax.sharding.Sharding` like the parameters, one sharding for all, or None (default device).
      dtype: of the leaves; None = `config.param_dtype`, "stored" = each leaf the smallest that holds its tensors.

    Returns:
      The tree that `make_model(config).apply({"params": ...})` takes. Beyond it, one tensor is alive at a time.

    Raises:
      ModelFileError: a file is missing or unreadable, leaves the directory, or a tensor is missing, extra or misshapen.
    """
    one = None if dtype == STORED else jnp.dtype(config.param_dtype if dtype is None else dtype)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    table = [replace(entry, name=common_name(entry.name, config)) for entry in tensor_table(config)]
    params: dict = {}
    with ExitStack() as stack:
        checkpoint = _Checkpoint(Path(directory), config, stack)
        checkpoint.check(table, config)
        for entries in _by_leaf(table):
            path = entries[0].path
            where = shardings if isinstance(shardings, jax.sharding.Sharding) else _tree_get(shardings, path)
            own = one or common_dtype(checkpoint.dtype(entry.name) for entry in entries)
            _tree_set(params, path, _load_leaf(checkpoint, entries, where, own))
    return params


def stored_dtypes(directory: str | os.PathLike, config: ModelConfig) -> dict[str, np.dtype]:
    """{name in `tensor_table`: dtype} of the tensors of a directory, float32 for those in float64.

    Tensors that it lacks, as a bare encoder does those of a classifier's head, are left out; without weights that can
    be read, all are.

    Raises:
      ModelFileError: a file is unreadable or missing.
    """
    directory = Path(directory)
    if not (directory / SINGLE_FILE).is_file() and not (directory / INDEX_FILE).is_file():
        return {}
    with ExitStack() as stack:
        checkpoint = _Checkpoint(directory, config, stack)
        names = {entry.name: common_name(entry.name, config) for entry in tensor_table(config)}
        return {own: checkpoint.dtype(name) for own, name in names.items() if name in checkpoint.file_of}


def written_dtypes(
    config: ModelConfig, source_dir: str | os.PathLike | None = None, dtype: str | None = None
) -> dict[str, np.dtype]:
    """The dtype that `save_params` gives each tensor, by its name in `tensor_table`; none where it keeps its own.

    Args:
      config: of the model that is saved.
      source_dir: the base's directory: each tensor has the dtype that it has there, and one that is not there, a new
        head's, that of most others.
      dtype: one for all instead.

    Raises:
      ValueError: no weights are written in `dtype`.
      ModelFileError: a file of the base is unreadable.
    """
    check_dtype(dtype)
    table = tensor_table(config)
    if dtype is not None:
        return {entry.name: jnp.dtype(dtype) for entry in table}
    stored = {} if source_dir is None else stored_dtypes(source_dir, config)
    if not stored:
        return {}
    others = main_dtype(table, stored)
    return {entry.name: stored.get(entry.name, others) for entry in table}


def _tensors(
    params: dict, table: list[TensorEntry], dtypes: dict[str, np.dtype], wanted: bool
) -> dict[str, np.ndarray]:
    """{file name: host array} of the entries, fetched one at a time; nothing where not `wanted`, but fetched too."""
    found = {}
    for entry in table:
        leaf = _tree_get(params, entry.path)
        value = np.asarray(gathered(leaf if entry.layer is None else leaf[entry.layer]))
        if wanted:
            value = as_written(value.T if entry.transpose else value, dtypes[entry.name], entry.name)
            found[entry.name] = np.ascontiguousarray(value)
    return found


def _write_shards(
    folder: Path | None, params: dict, table: list[TensorEntry], dtypes: dict[str, np.dtype], max_shard_bytes: int
) -> None:
    sizes = [dtypes[e.name].itemsize * int(np.prod(e.shape)) for e in table]
    groups: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry, size in zip(table, sizes, strict=True):
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = [SINGLE_FILE] if len(groups) == 1 else names
    weight_map = {}
    for name, group in zip(names, groups, strict=True):
        tensors = _tensors(params, group, dtypes, wanted=folder is not None)
        if folder is not None:
            save_tensors(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((entry.name for entry in group), name))
    if folder is not None and len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, source: Path | None, dtype: np.dtype | None) -> dict[str, Any]:
    """The source's own `config.json`, else one made from `config`; an encoder may have another head than its source.

    Args:
      config: of the model.
      source: directory of the base.
      dtype: what it is to say; None leaves that as the source has it.
    """
    if source is None:
        values = config_to_hf(config)
        return values | dtype_fields(values, dtype or config.param_dtype)
    origin, values = read_config(source), read_json(source / "config.json")
    if isinstance(origin, EncoderConfig) and isinstance(config, EncoderConfig):
        ours = config_to_hf(config)
        values = {name: of for name, of in values.items() if name not in LABEL_FIELDS}
        values |= {name: of for name, of in ours.items() if name in ("architectures", *LABEL_FIELDS)}
        origin = replace(origin, head=config.head, labels=config.labels, pooler=config.pooler)
    if not same_model(origin, config):
        raise ModelFileError(f"{source / 'config.json'}: describes another model than the one that is saved")
    return values if dtype is None else values | dtype_fields(values, dtype)


def save_params(
    params: dict,
    config: ModelConfig,
    directory: str | os.PathLike,
    source_dir: str | os.PathLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
) -> None:
    """Writes a Hugging Face directory that `load_params` and `transformers` read back.

    The directory is written beside its final place and renamed, so that it is there whole or not at all. Of several
    processes all must call this, and the first writes.

    Args:
      params: the parameter tree.
      config: its config.
      directory: to be made; must not exist, or be empty.
      source_dir: the directory that the base came from: its `config.json` and the `carried_files` are taken over, and
        each tensor is rounded to the dtype that it has there.
      max_shard_bytes: files larger than this are split and get an index; one file's tensors are in memory at a time.
      dtype: of all tensors instead, and what `config.json` says then: "float32", "bfloat16" or "float16". With neither
        this nor weights in `source_dir` each tensor keeps the dtype of its leaf.

    Raises:
      FileExistsError: `directory` is there and not empty.
      ModelFileError: `source_dir` describes another model, or a file of it cannot be carried over.
      ValueError: a leaf has another shape than `config` says, or a number does not fit into float16.
    """
    target = Path(directory)
    source = None if source_dir is None else Path(source_dir)
    check_shapes(params, config)
    table = tensor_table(config)
    wanted = written_dtypes(config, source, dtype)
    written = wanted or {entry.name: _tree_get(params, entry.path).dtype for entry in table}
    as_the_base = dtype is None and wanted
    values = _config_json(config, source, None if as_the_base else main_dtype(table, written))
    carried = {} if source is None else carried_files(source)
    with new_folder(target) as folder:
        _write_shards(folder, params, table, written, max_shard_bytes)
        if folder is not None:
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            copy_files(carried, folder)
