"""Device meshes and the rows of a batch on them; `sharding.py` says where parameters live.

    data        rows of the batch; parameters are copied
    fsdp        rows of the batch and one axis of every large parameter
    sequence    the tokens of each row, and the same axis of every large parameter of a decoder
    tensor      heads, inner widths and the vocabulary; each of its devices sees the same tokens

Axes are made with `AxisType.Auto`, so the compiler places collectives, and every jitted function is given explicit
shardings for what goes in and comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "sequence", "tensor")  # the last has the closest neighbours


class MeshError(ValueError):
    """A mesh does not fit the devices, the batch or a parameter."""

    exit_code = 2


def make_mesh(description: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `sequence` and `tensor`.

    Args:
      description: "data=2,fsdp=4"; an axis that is not named has size 1, one size may be -1 (all that is left), and an
        empty description is "data=-1".
      devices: the devices to use, all of them in that order; None takes every device, or as many as the sizes ask for.

    Raises:
      MeshError: an axis is unknown or given twice, a size is not a number, or the sizes do not fit the devices, or
        leave some of them out beside a -1.
    """
    sizes = _parse(description or "data=-1")
    available = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            _check_divides(description, known, len(available))
            sizes[axis] = len(available) // known
    needed = math.prod(sizes.values())
    if needed > len(available) or (devices is not None and needed != len(available)):
        raise MeshError(f"mesh={description!r} asks for {needed} devices and there are {len(available)}")
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=available[:needed])


def _check_divides(description: str, known: int, count: int) -> None:
    """Returns when the given sizes leave a whole number of devices to the axis that takes the rest."""
    if count % known:
        fits = max(size for size in range(1, min(known, count) + 1) if count % size == 0)
        raise MeshError(
            f"mesh={description!r}: the sizes make {known}, which does not divide {count} devices: make them {fits}"
        )


def _parse(description: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in description.split(","):
        axis, separator, text = part.strip().partition("=")
        if axis not in AXES or not separator or axis in sizes:
            raise MeshError(f"mesh={description!r}: write each of {', '.join(AXES)} at most once, as in data=2,fsdp=4")
        try:
            sizes[axis] = int(text)
        except ValueError:
            raise MeshError(f"mesh={description!r}: the size of {axis} is not a whole number") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise MeshError(f"mesh={description!r}: the size of {axis} must be at least 1, or -1 for all that is left")
    if list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh={description!r}: only one size may be -1")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a (B, S) array of a batch: rows over `data` and `fsdp`, their tokens over `sequence`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def row_ways(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Returns when the rows of each micro-batch divide evenly over the devices.

    Raises:
      MeshError: they do not; says which batch size would.
    """
    ways = row_ways(mesh)
    unit = ways * accumulate
    if batch_size % unit:
        split = f"{mesh.size} devices" if ways == mesh.size else f"rows split {ways} ways"
        raise MeshError(f"batch_size={batch_size}: {split} and accumulate={accumulate} need a multiple of {unit}")


def check_length(mesh: Mesh, sequence_length: int) -> None:
    """Returns when the tokens of a row divide evenly over the `sequence` axis.

    Raises:
      MeshError: they do not; says which length would.
    """
    ways = mesh.shape["sequence"]
    if sequence_length % ways:
        raise MeshError(f"sequence_length={sequence_length}: sequence={ways} needs a multiple of {ways}")


def held_rows(mesh: Mesh, batch_size: int, devices: Sequence[Any] | None = None) -> np.ndarray:
    """The rows of a batch that `devices` (None: those of this process) hold, ascending. (R,) int64.

    With a `tensor` axis across hosts several processes hold the same rows.
    """
    own = set(mesh.local_devices if devices is None else devices)
    places = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).devices_indices_map((batch_size,))
    held = [np.arange(batch_size)[index[0]] for device, index in places.items() if device in own]
    return np.unique(np.concatenate(held))


def put(value: Any, sharding: Sharding) -> Array:
    """An array on devices that may belong to other processes too; each process has all of it and sends what is its own.

    `jax.device_put` would first compare all processes' copies, whole on every device.
    """
    if sharding.is_fully_addressable or (isinstance(value, Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_batch(batch: Mapping[str, Any], mesh: Mesh, batch_size: int | None = None) -> dict[str, Array]:
    """The batch on the devices of `mesh`, rows dealt over `data` and `fsdp`, their tokens over `sequence`.

    Args:
      batch: {name: (B, ...)} with all rows, or with those that this process holds, in the order of `held_rows`.
      mesh: of the run.
      batch_size: B; None where `batch` has all rows.

    Raises:
      MeshError: the rows do not divide, or are neither all nor those of this process.
    """
    sharding = batch_sharding(mesh)
    rows = len(next(iter(batch.values())))
    total = batch_size or rows
    if total % row_ways(mesh):
        raise MeshError(f"a batch of {total} rows: the devices need a multiple of {row_ways(mesh)}")
    if sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)
    held = np.arange(total) if rows == total else held_rows(mesh, total)
    if len(held) != rows:
        raise MeshError(f"a batch of {rows} rows: give all {total}, or the {len(held)} of this process")

    def place(value: Any) -> Array:
        def part(index: Any) -> np.ndarray:
            first = int(np.searchsorted(held, index[0].start or 0))
            return np.asarray(value)[first : first + total // row_ways(mesh), *index[1:]]

        return jax.make_array_from_callback((total, *value.shape[1:]), sharding, part)

    return {name: place(value) for name, value in batch.items()}
