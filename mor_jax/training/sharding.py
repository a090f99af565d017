"""Where every array of a step lives: one table from logical axes to mesh axes, and the specs derived from it.

    decoder         each axis of each parameter has a name (`models.logical_axes`), each name a field of `ShardingRules`
    activations     the decoder names theirs; inside `on_mesh` they are held to the same table
    adapters        follow their kernels; a large factor that no `fsdp` reaches is split along its longest axis
    other models    the longest axis of each large parameter over `fsdp`

Without constraints on activations the compiler is free to gather those instead of the weights of one layer.

Along `sequence` each device has a part of every row. All but attention is a matter of one token; there queries stay
where they are and the keys and values of a row are gathered, 2 x kv_heads x head_dim numbers a token of one layer: with
grouped queries far less than the residual stream, and no mask, window, soft cap or packing needs to know of it.

The embedding table is far larger than the rows that a step reads from it. So each device reads its part of the width
for the tokens of all devices that share the table, and the parts go to where their tokens are. Left alone the compiler
gathers the table, or all rows, as soon as there is `tensor`, or `sequence` beside `fsdp`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.models.logical_axes import ALL_KEYS, INNER, KEY_HEADS, LOOKED_UP, QUERY_HEADS
from mor_jax.training.mesh import MeshError

SMALLEST = 2**14  # elements of a parameter; smaller ones stay whole on each device


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; () keeps it whole.

    Example:
      >>> ShardingRules().spec(("layers", "embed", "mlp"))
      PartitionSpec(None, ('fsdp', 'sequence'), 'tensor')
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    key_length: tuple[str, ...] = ()  # a query may look at any key of its row
    layers: tuple[str, ...] = ()  # a scan reads one layer at a time
    embed: tuple[str, ...] = ("fsdp", "sequence")  # devices that share rows need not hold copies of the base
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    table: tuple[str, ...] = ("fsdp", "sequence", "tensor")  # every device that shares tokens reads a part
    looked_up: tuple[str, ...] = ("fsdp", "sequence", "tensor")
    looked_up_batch: tuple[str, ...] = ("data",)

    def __post_init__(self):
        """Activations too may not collide; flax would drop one of the two in silence."""
        for names in (INNER, QUERY_HEADS, KEY_HEADS, ALL_KEYS, *LOOKED_UP):
            self.spec(names)

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The spec of an array whose axes have these names; None is an axis that is never split.

        Raises:
          MeshError: a name is unknown, or one mesh axis would split two axes of the array.
        """
        known = {field.name for field in dataclasses.fields(self)}
        unknown = [name for name in names if name is not None and name not in known]
        if unknown:
            raise MeshError(
                f"no sharding rule for the logical axis {unknown[0]!r}; there are {', '.join(sorted(known))}"
            )
        parts = [() if name is None else getattr(self, name) for name in names]
        used = [axis for part in parts for axis in part]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise MeshError(f"the sharding rules split two axes of {tuple(names)} over {twice[0]}: give one of them ()")
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def pairs(self, mesh: Mesh) -> tuple[tuple[str, Any], ...]:
        """(logical axis, mesh axes) as flax reads them, of the axes that `mesh` has."""
        found = []
        for field in dataclasses.fields(self):
            axes = tuple(axis for axis in getattr(self, field.name) if axis in mesh.axis_names)
            found.append((field.name, axes or None))
        return tuple(found)


RULES = ShardingRules()


def on_mesh(function: Callable[..., Any], mesh: Mesh | None, rules: ShardingRules = RULES) -> Callable[..., Any]:
    """`function` traced with the activations of our models held to `rules` on `mesh`; itself without a mesh.

    The context is opened while tracing, since it is no part of what `jax.jit` caches by.
    """
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules.pairs(mesh)):
            return function(*args)

    return traced


@contextlib.contextmanager
def on_devices(mesh: Mesh, rules: ShardingRules = RULES) -> Iterator[None]:
    """Within it arrays are made on `mesh`, and the activations of our models are held to `rules` wherever they run."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.pairs(mesh)):
        yield


def param_specs(
    params: Any, mesh: Mesh, smallest: int = SMALLEST, axes: Any = None, rules: ShardingRules = RULES
) -> Any:
    """A `PartitionSpec` for every base parameter.

    Args:
      params: pytree of arrays or `ShapeDtypeStruct`s.
      mesh: of `make_mesh`.
      smallest: parameters with fewer elements stay whole on each device.
      axes: tree like `params` of tuples of logical axis names; None (another's model) splits the largest axis that
        divides over `fsdp`, but never the first of three, which is the layer axis of a scan.
      rules: what the names mean.

    Raises:
      MeshError: an axis of a large parameter does not divide; names parameter, shape and mesh axis.
    """

    def spec(path, leaf, names):
        if leaf.size < smallest:
            return PartitionSpec()
        if names is None:
            return _largest_axis(path, leaf, mesh.shape.get("fsdp", 1))
        return _fitting(path, leaf, rules.spec(names), mesh)

    if axes is None:
        axes = jax.tree.map(lambda _: None, params)
    return jax.tree.map_with_path(spec, params, axes)


def _largest_axis(path: Any, leaf: Any, size: int) -> PartitionSpec:
    if size == 1:
        return PartitionSpec()
    divisible = [axis for axis in range(1 if leaf.ndim >= 3 else 0, leaf.ndim) if leaf.shape[axis] % size == 0]
    if not divisible:
        raise MeshError(
            f"{_name(path)} of shape {leaf.shape} has no axis that divides by fsdp={size}: choose another size"
        )
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(largest + 1)))


def _fitting(path: Any, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """`spec` without mesh axes of size 1, once every axis is known to divide."""
    parts = []
    for size, part in zip(leaf.shape, spec, strict=True):
        axes = tuple(axis for axis in _axes_of(part) if mesh.shape.get(axis, 1) > 1)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            sizes = ",".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise MeshError(
                f"{_name(path)} of shape {leaf.shape}: {size} does not divide by {sizes}: choose another size"
            )
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def check_heads(num_heads: int, num_kv_heads: int, mesh: Mesh) -> None:
    """Returns when whole heads fit on each device of the `tensor` axis.

    Raises:
      MeshError: they do not; says which sizes would.
    """
    size, both = mesh.shape.get("tensor", 1), math.gcd(num_heads, num_kv_heads)
    if both % size:
        raise MeshError(
            f"tensor={size} does not divide {num_heads} heads and {num_kv_heads} key-value heads: "
            f"choose a divisor of {both}"
        )


def spread(spec: PartitionSpec, leaf: Any, mesh: Mesh) -> PartitionSpec:
    """`spec` of an adapter's leaf, split over `fsdp` too where the leaf is large and its kernel's rule did not.

    At 405 billion parameters whole factors with their moments and gradients would fill a chip.
    """
    size = mesh.shape.get("fsdp", 1)
    parts = list(spec) + [None] * (leaf.ndim - len(spec))
    if size == 1 or leaf.size < SMALLEST or any("fsdp" in _axes_of(part) for part in parts):
        return spec
    first = 1 if leaf.ndim >= 3 else 0
    ways = [math.prod(mesh.shape[axis] for axis in _axes_of(part)) for part in parts]
    fitting = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % (size * ways[axis]) == 0]
    if not fitting:
        return spec
    chosen = max(fitting, key=lambda axis: leaf.shape[axis] // ways[axis])
    axes = (*_axes_of(parts[chosen]), "fsdp")
    parts[chosen] = axes[0] if len(axes) == 1 else axes
    return PartitionSpec(*parts)


def hold_split(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """What a step computes once from adapters, and so its gradient, split over `fsdp` where it is large.

    Without it a compiler keeps such a leaf of all layers whole on each device. Other axes are left to the compiler.
    """
    spec = spread(PartitionSpec(), leaf, mesh)
    if not any(spec):
        return leaf
    free = (PartitionSpec.UNCONSTRAINED if part is None else part for part in spec)
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*free)))


def shardings_of(specs: Any, mesh: Mesh) -> Any:
    """The `NamedSharding`s on `mesh` of a pytree of `PartitionSpec`s."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def _axes_of(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
