"""Names of the axes of a decoder's arrays; which mesh axes they are split over is decided elsewhere.

    vocab                   tokens of the vocabulary
    embed                   the residual stream, as an axis of a parameter
    heads, kv_heads, mlp    query heads, key-value heads, the inner width of the MLP
    layers                  the stacked layers of a scan
    batch, length           rows and their tokens, of activations only
    key_length              tokens as keys and values, which queries anywhere in their row look at
    table, looked_up        the width of the embedding table while rows are read from it, and of those rows
    looked_up_batch         rows of the batch as that look-up sees them

An axis without a name (None) is never split: norms, and the residual stream of activations.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

Axes = tuple[str | None, ...]

RESIDUAL: Axes = ("batch", "length", None)
INNER: Axes = ("batch", "length", "mlp")
QUERY_HEADS: Axes = ("batch", "length", "heads", None)
KEY_HEADS: Axes = ("batch", "length", "kv_heads", None)
ALL_KEYS: Axes = ("batch", "key_length", "kv_heads", None)
TABLE: Axes = (None, "table")
LOOKED_UP_IDS: Axes = ("looked_up_batch", None)
LOOKED_UP: tuple[Axes, ...] = (  # what each device read, then one mesh axis after the other to where `RESIDUAL` is
    ("looked_up_batch", None, "looked_up"),
    ("looked_up_batch", None, "embed"),
    ("batch", None, "length"),
    RESIDUAL,
)

_KERNELS: dict[str, Axes] = {
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


def split_ways(*names: str) -> int:
    """How many parts these axes of an activation are split into where this is traced; 1 without rules or a mesh."""
    rules = dict(nn.get_logical_axis_rules())
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = [(own,) if isinstance(own := rules.get(name), str) else own or () for name in names]
    return math.prod(sizes[axis] for part in axes for axis in part)


def logical_axes(params: Any) -> Any:
    """A tuple of axis names for each parameter of a decoder, in a tree like `params`.

    Args:
      params: arrays or shapes, layers stacked or apart.

    Raises:
      ValueError: a matrix has no line in the table; names it.
    """

    def names(path: tuple[Any, ...], leaf: Any) -> Axes:
        module, kind = path[-2].key, path[-1].key
        stacked: Axes = ("layers",) if path[0].key == "layers" else ()
        if kind == "scale":
            own: Axes = (None,)
        elif module in _KERNELS and kind in ("kernel", "embedding", "bias"):
            own = _KERNELS[module][-1:] if kind == "bias" else _KERNELS[module]
        else:
            own = ()
        if len(stacked + own) != leaf.ndim:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{where} of shape {leaf.shape} has no logical axes: add it to mor_jax/models/logical_axes.py"
            )
        return stacked + own

    return jax.tree.map_with_path(names, params)
