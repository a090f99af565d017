"""The dtype that each tensor of a checkpoint is kept in, and rounding to it.

A checkpoint need not have one dtype: kernels in bfloat16 often stand beside norms in float32. A stacked leaf has the
smallest dtype that holds all of its rows; each row is rounded to its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mor_jax.models.config import ModelConfig
from mor_jax.models.tensors import TensorEntry, tensor_table

STORED = "stored"  # for each leaf the dtype of its tensors in the file
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # jax has no float64 by default


class DtypeRangeError(ValueError, FloatingPointError):
    """A number is too large for the dtype that it should be written in."""

    exit_code = 2


def common_dtype(dtypes: Iterable[Any]) -> np.dtype:
    """The smallest dtype that holds the numbers of all of these."""
    return functools.reduce(jnp.promote_types, [jnp.dtype(dtype) for dtype in dtypes])


def main_dtype(table: Iterable[TensorEntry], dtypes: Mapping[str, np.dtype]) -> np.dtype:
    """The dtype of most numbers among the tensors that `dtypes` names."""
    numbers: Counter[np.dtype] = Counter()
    for entry in table:
        if entry.name in dtypes:
            numbers[dtypes[entry.name]] += int(np.prod(entry.shape))
    return numbers.most_common(1)[0][0]


def round_params(params: dict, config: ModelConfig, dtypes: Mapping[str, np.dtype]) -> dict:
    """The parameters as a file with these dtypes would hold them, each number rounded once, to the nearest.

    Args:
      params: the tree, sharded or not; it is not changed.
      config: its config.
      dtypes: of the tensors by their names in `tensor_table`; one that is not named keeps its own.

    Returns:
      The tree with its shardings; the dtype of a leaf is the common one of its rows.

    Raises:
      DtypeRangeError: a number does not fit into float16.
    """
    rounded: dict = {}
    rows: dict[tuple[str, ...], list[Any]] = {}
    for entry in tensor_table(config):
        rows.setdefault(entry.path, []).append(dtypes.get(entry.name))
    for path, wanted in rows.items():
        leaf, place = params, rounded
        for key in path[:-1]:
            leaf, place = leaf[key], place.setdefault(key, {})
        place[path[-1]] = _rounded(leaf[path[-1]], wanted, "/".join(path))
    return rounded


def _rounded(leaf: Any, wanted: list[Any], name: str) -> Any:
    """One leaf, its rows in the dtypes `wanted`; one operation after another, since a compiler may leave a cast out."""
    rows = [leaf.dtype if dtype is None else dtype for dtype in wanted]
    if len(set(rows)) == 1:
        found = leaf.astype(rows[0])
    else:
        common = common_dtype(rows)
        found = leaf.astype(common)
        for dtype in dict.fromkeys(rows):
            mask = np.array([row == dtype for row in rows]).reshape(-1, *(1,) * (leaf.ndim - 1))
            found = jnp.where(mask, leaf.astype(dtype).astype(common), found)
    if jnp.float16 in rows and bool(jnp.isinf(found).any()):
        raise _too_large(name)
    return found


def _too_large(name: str) -> DtypeRangeError:
    return DtypeRangeError(
        f"{name}: a number is beyond the range of float16, +-65504: give --dtype bfloat16 or --dtype float32"
    )


def as_written(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """One host array in the dtype that it is written in.

    Raises:
      DtypeRangeError: a number does not fit into float16.
    """
    with np.errstate(over="ignore"):
        found = value.astype(dtype, copy=False)
    if dtype == jnp.float16 and np.isinf(found).any():
        raise _too_large(name)
    return found


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError unless it is None or one that weights are written in."""
    known = dict.fromkeys(DTYPES.values())
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype={dtype!r}: weights are written in {', '.join(known)}")


def dtype_fields(values: Mapping[str, Any], dtype: np.dtype) -> dict[str, str]:
    """What a `config.json` is to say of the dtype, under the name or names that it has for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return dict.fromkeys(names, str(dtype))
