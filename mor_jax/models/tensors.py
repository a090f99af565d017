"""Which tensor of a Hugging Face file is which leaf of the parameter tree: one table, read in both directions.

A linear map is (out, in) in the file, (in, out) here; per-layer tensors are the rows of a stacked leaf when layers are
scanned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.family import abstract_params

_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq|embeddings\.position_ids")  # some old files carry them
_PRETRAINING_HEADS = r"cls\..*|lm_head\..*"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file and where it lives in the parameter tree."""

    name: str  # in the file
    path: tuple[str, ...]  # of the leaf
    layer: int | None  # row of a stacked leaf; None for a leaf of its own
    shape: tuple[int, ...]  # in the file
    transpose: bool


def tensor_table(config: ModelConfig) -> list[TensorEntry]:
    """Every tensor of a checkpoint of `config`, layer by layer within each leaf."""
    stack = "layers" if isinstance(config, DecoderConfig) else "layer"
    table = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        path = tuple(key.key for key in keys)
        place = next((n for n, part in enumerate(path) if re.fullmatch(rf"{stack}(_\d+)?", part)), None)
        stacked = place is not None and path[place] == stack
        transpose = path[-1] == "kernel"
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transpose else shape
        if place is None:
            table.append(TensorEntry(_file_name(path, config), path, None, shape, transpose))
            continue
        rows = range(config.num_layers) if stacked else [int(path[place].rpartition("_")[2])]
        for row in rows:
            named = (*path[:place], stack, str(row), *path[place + 1 :])
            table.append(TensorEntry(_file_name(named, config), path, row if stacked else None, shape, transpose))
    return table


def _file_name(path: tuple[str, ...], config: ModelConfig) -> str:
    *modules, leaf = path
    if isinstance(config, EncoderConfig):
        prefix = [] if modules[0] == "classifier" or config.head == "none" else [config.model_type]
    else:
        prefix = [] if modules[0] == "lm_head" else ["model"]
    return ".".join([*prefix, *modules, "bias" if leaf == "bias" else "weight"])


def common_name(name: str, config: ModelConfig) -> str:
    """The name that a tensor has whatever class its file was saved from; for decoders the name itself."""
    if isinstance(config, DecoderConfig):
        return name
    name = name.removeprefix(config.model_type + ".")
    for old, new in _OLD_NAMES:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def is_derived(name: str) -> bool:
    """Whether a tensor is computed from the config, so that a file need not have it."""
    return _DERIVED.fullmatch(name) is not None


def is_left_out(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a head of pre-training, or to a pooler or classifier that the config goes without."""
    if isinstance(config, DecoderConfig):
        return False
    pattern = _PRETRAINING_HEADS
    pattern += "" if config.pooler else r"|pooler\..*"
    pattern += r"|classifier\..*" if config.head == "none" else ""
    return re.fullmatch(pattern, name) is not None


def check_shapes(params: dict, config: ModelConfig) -> None:
    """Raises ValueError unless the leaves of a parameter tree are those of `config`, in its shapes."""
    expected = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    found = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    for path, leaf in expected:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if path not in found:
            raise ValueError(f"parameter {name} is missing")
        if found[path].shape != leaf.shape:
            raise ValueError(f"parameter {name} has shape {found[path].shape}, the config asks for {leaf.shape}")
    if len(found) != len(expected):
        extra = {
            jax.tree_util.keystr(path, simple=True, separator="/") for path in found.keys() - dict(expected).keys()
        }
        raise ValueError(f"parameters {sorted(extra)} have no place in a {config.model_type} checkpoint")
