"""Device meshes and the shardings of everything that lives on them.

    data    rows of the batch; parameters are copied
    fsdp    rows of the batch and one axis of every large parameter

Axes are made with `AxisType.Auto`, so the compiler places collectives, and every jitted function is given explicit
shardings for what goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")


class MeshError(ValueError):
    """A mesh does not fit the devices, the batch or a parameter."""

    exit_code = 2


def make_mesh(description: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data` and `fsdp`.

    Args:
      description: "data=2,fsdp=4"; an axis that is not named has size 1, one size may be -1 (all that is left), and an
        empty description is "data=-1".
      devices: the devices to use, all of them in that order; None takes every device, or as many as the sizes ask for.

    Raises:
      MeshError: an axis is unknown or given twice, a size is not a number, or the sizes do not fit the devices.
    """
    sizes = _parse(description or "data=-1")
    available = list(jax.devices() if devices is None else devices)
    known = 1
    for size in sizes.values():
        known *= 1 if size == -1 else size
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = len(available) // known
    needed = sizes["data"] * sizes["fsdp"]
    if needed > len(available) or needed < 1 or (devices is not None and needed != len(available)):
        raise MeshError(f"mesh={description!r} asks for {needed or known} devices and there are {len(available)}")
    shape = (sizes["data"], sizes["fsdp"])
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=available[:needed])


def _parse(description: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in description.split(","):
        axis, separator, text = part.strip().partition("=")
        if axis not in BATCH_AXES or not separator or axis in sizes:
            raise MeshError(
                f"mesh={description!r}: write each of {', '.join(BATCH_AXES)} at most once, as in data=2,fsdp=4"
            )
        try:
            sizes[axis] = int(text)
        except ValueError:
            raise MeshError(f"mesh={description!r}: the size of {axis} is not a whole number") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise MeshError(f"mesh={description!r}: the size of {axis} must be at least 1, or -1 for all that is left")
    if list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh={description!r}: only one size may be -1")
    return {axis: sizes.get(axis, 1) for axis in BATCH_AXES}


def param_specs(params: Any, mesh: Mesh, smallest: int = 2**14) -> Any:
    """A `PartitionSpec` for every base parameter: its largest axis that divides goes over `fsdp`.

    The layer axis of a scanned kernel (the first of three) stays whole, because the scan reads one layer at a time.

    Args:
      params: pytree of arrays or `ShapeDtypeStruct`s.
      mesh: of `make_mesh`.
      smallest: parameters with fewer elements stay whole on each device.

    Raises:
      MeshError: no axis of a large parameter divides by the size of `fsdp`; names parameter and shape.
    """
    size = mesh.shape["fsdp"]

    def spec(path, leaf):
        if size == 1 or leaf.size < smallest:
            return PartitionSpec()
        axes = range(1 if leaf.ndim >= 3 else 0, leaf.ndim)
        divisible = [axis for axis in axes if leaf.shape[axis] % size == 0]
        if not divisible:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise MeshError(
                f"{name} of shape {leaf.shape} has no axis that divides by fsdp={size}: choose another size"
            )
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(largest + 1)))

    return jax.tree.map_with_path(spec, params)


def shardings_of(specs: Any, mesh: Mesh) -> Any:
    """The `NamedSharding`s on `mesh` of a pytree of `PartitionSpec`s."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a (B, S) array of a batch: its rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Returns when the rows of each micro-batch divide evenly over the devices.

    Raises:
      MeshError: they do not; says which batch size would.
    """
    unit = mesh.size * accumulate
    if batch_size % unit:
        raise MeshError(
            f"batch_size={batch_size}: {mesh.size} devices and accumulate={accumulate} need a multiple of {unit}"
        )


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Array]:
    """The batch on the devices of `mesh`, rows dealt over all of them."""
    return jax.device_put(batch, batch_sharding(mesh))


def put_params(params: Any, specs: Any, mesh: Mesh) -> Any:
    """`params` placed on `mesh` as `specs` say."""
    return jax.device_put(params, shardings_of(specs, mesh))
