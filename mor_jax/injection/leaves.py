"""An adapter's arrays for a whole model: made, prepared, sharded, and joined with the base parameters.

The user's trees are flat by site, ``{"layers/mlp/up_proj": {"a": (layers, in, r), ...}}``, layer axes leading. Just
before the model runs they are joined into the base parameters under one reserved key of each adapted module, layer axes
moved to where the kernel has them, so that a foreign ``nn.scan`` over ``params`` carries them; nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array
from jax.sharding import PartitionSpec

from mor_jax.adapters import AdapterInputs, Kernel, Leaves, site_id
from mor_jax.injection.arguments import check_leaves, check_params
from mor_jax.injection.plan import AdaptedSite, AdapterPlan
from mor_jax.injection.products import RESERVED
from mor_jax.injection.targets import InjectionError
from mor_jax.injection.trained import get_path


def set_path(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of the nested mappings along ``path`` with ``value`` at its end; all else is shared."""
    copy = dict(tree)
    copy[path[0]] = value if len(path) == 1 else set_path(copy.get(path[0], {}), path[1:], value)
    return copy


def _layer_axes_leading(value: Array, adapted: AdaptedSite) -> Array:
    return jnp.moveaxis(value, adapted.stack_positions, range(len(adapted.stack_positions)))


def _layer_axes_stored(value: Array, positions: tuple[int, ...]) -> Array:
    """``value`` with its first axes moved to ``positions``, as far as it has so many; by rising position."""
    places = tuple(min(p, value.ndim - 1) for p in positions)
    return jnp.moveaxis(value, range(len(places)), places)


def site_kernels(params: Mapping[str, Any], adapted: AdaptedSite) -> Kernel:
    """The site's stored kernel with its layer axes leading."""
    value = meta.unbox(get_path(params, adapted.kernel_path))
    return Kernel(_layer_axes_leading(value, adapted), adapted.in_axes, adapted.out_axes)


@dataclass(frozen=True)
class _UnseenKernel(Kernel):
    """A stored kernel that is not the one its module multiplies by: it has a shape, and nobody may read its numbers."""

    path: str = ""

    def dense(self, dtype: Any = jnp.float32) -> Array:
        """Raises InjectionError: a method that reads it would read another kernel."""
        raise InjectionError(
            f"{self.path}: the method reads the kernel's numbers, but the module sees its kernel through a function of "
            "what is stored (nn.WeightNorm, nn.map_variables); exclude it from the targets, or choose lora"
        )


def _readable_kernels(params: Mapping[str, Any], adapted: AdaptedSite) -> Kernel:
    """``site_kernels`` as a method may read them outside of the model."""
    kernels = site_kernels(params, adapted)
    if adapted.kernel_seen:
        return kernels
    return _UnseenKernel(kernels.value, kernels.in_axes, kernels.out_axes, adapted.site.path)


def replace_site_kernels(params: Mapping[str, Any], adapted: AdaptedSite, stacked: Array) -> dict[str, Any]:
    """``params`` with the site's kernel replaced by ``stacked``, layer axes leading, in the kernel's own layout."""
    value = jnp.moveaxis(stacked, range(len(adapted.stack_positions)), adapted.stack_positions)
    old = get_path(params, adapted.kernel_path)
    if isinstance(old, meta.AxisMetadata):
        value = old.replace_boxed(value)
    return set_path(params, adapted.kernel_path, value)


def over_layers(function: Callable[..., Any], adapted: AdaptedSite) -> Callable[..., Any]:
    """``function`` of one layer's arrays, mapped over all leading layer axes."""
    for _ in adapted.stack_sizes:
        function = jax.vmap(function)
    return function


def init_leaves(key: Array, plan: AdapterPlan, params: Mapping[str, Any]) -> Leaves:
    """All adapters' leaves, trained modules copied in float32. Layers and experts have a draw each.

    Args:
        key: The root key; a site's key depends on its path and layer alone, not on what else is adapted.
        plan: From ``resolve_sites``.
        params: The frozen base parameters (DoRA reads its kernels' norms).

    Raises:
        InjectionError: ``params`` is something else, or of another model.
    """
    check_params(params, plan)
    params_tree: dict[str, Any] = {}
    trees = Leaves(params_tree, {}, {})
    for adapted in plan.sites:
        root = jax.random.fold_in(key, site_id(adapted.site.path))

        def init(layer: Array, kernel: Array, adapted: AdaptedSite = adapted, root: Array = root) -> Leaves:
            view = dataclasses.replace(_readable_kernels(params, adapted), value=kernel)
            return adapted.adapter.init(jax.random.fold_in(root, layer), adapted.site, layer, view)

        layers = jnp.arange(adapted.site.num_layers, dtype=jnp.int32).reshape(adapted.stack_sizes)
        leaves = over_layers(init, adapted)(layers, site_kernels(params, adapted).value)
        for tree, own in zip(trees, leaves, strict=True):
            if own:
                tree[adapted.site.path] = own
    for name, sites in plan.shared.items():
        own: Any = sites[0].adapter.shared(jax.random.fold_in(key, site_id(name)), tuple(s.site for s in sites))
        for tree, part in zip(trees, own, strict=True):
            if part:
                tree[name] = part
    for path, adapted in plan.gates.items():
        root = jax.random.fold_in(key, site_id(path))

        def init_gate(layer: Array, adapted: AdaptedSite = adapted, root: Array = root) -> dict[str, Array]:
            return adapted.adapter.init_gate(jax.random.fold_in(root, layer), adapted.gate_features)

        layers = jnp.arange(adapted.site.num_layers, dtype=jnp.int32).reshape(adapted.stack_sizes)
        params_tree[path] = over_layers(init_gate, adapted)(layers)
    for path in plan.trained_modules:
        module = meta.unbox(get_path(params, tuple(path.split("/"))))
        params_tree[path] = jax.tree.map(lambda v: jnp.array(v, jnp.float32), module)
    return trees


def site_leaves(leaves: Leaves, path: str) -> Leaves:
    """What is stored under one path (of a site, a gate or shared leaves) out of the trees of a whole model."""
    return Leaves(*(tree.get(path, {}) for tree in leaves))  # pyright: ignore[reportArgumentType]


def with_shared(own: Leaves, shared: Leaves) -> Leaves:
    """One layer's leaves of a site with those that it shares with other sites."""
    return Leaves(*({**tree, **part} for tree, part in zip(own, shared, strict=True)))


def _by_layer(value: Array, adapted: AdaptedSite) -> Array:
    """(stack..., ...) as (layers, experts, ...)."""
    depth = len(adapted.stack_sizes)
    layers = [axis for axis in range(depth) if axis not in adapted.expert_axes]
    moved = jnp.moveaxis(value, layers, range(len(layers)))
    return moved.reshape(adapted.site.layers, -1, *value.shape[depth:])


def _by_stack(value: Array, adapted: AdaptedSite) -> Array:
    """(layers, experts, ...) as (stack..., ...)."""
    sizes = adapted.stack_sizes
    layers = [axis for axis in range(len(sizes)) if axis not in adapted.expert_axes]
    order = (*layers, *adapted.expert_axes)
    apart = value.reshape(*(sizes[axis] for axis in order), *value.shape[2:])
    return jnp.moveaxis(apart, range(len(layers)), layers)


def link_leaves(plan: AdapterPlan, leaves: Leaves) -> Leaves:
    """Leaves with what each layer's method needs of the earlier layers' leaves, whether they are stacked or apart."""
    check_leaves(leaves)
    trees: tuple[dict[str, Any], ...] = tuple(dict(tree) for tree in leaves)
    for sites in plan.chains.values():
        method = sites[0].adapter
        if not method.linked or any(s.site.path not in leaves.params for s in sites):
            continue
        own = [jax.tree.map(lambda v, s=s: _by_layer(v, s), site_leaves(leaves, s.site.path)) for s in sites]
        linked = jax.vmap(method.link, in_axes=1, out_axes=1)(jax.tree.map(lambda *v: jnp.concatenate(v), *own))
        start = 0
        for s in sites:
            end = start + s.site.layers
            own = jax.tree.map(lambda v, s=s, i=start, j=end: _by_stack(v[i:j], s), linked)
            start = end
            for tree, part in zip(trees, own, strict=True):
                if part:
                    tree[s.site.path] = part
    return Leaves(*trees)


def prepare_leaves(plan: AdapterPlan, leaves: Leaves, params: Mapping[str, Any]) -> Leaves:
    """Leaves with what each method computes once a step; differentiable, and the identity on its own result."""
    check_params(params, plan)
    leaves = link_leaves(plan, leaves)
    trees: tuple[dict[str, Any], ...] = tuple(dict(tree) for tree in leaves)
    for adapted in plan.sites:
        path = adapted.site.path
        if path not in leaves.params:
            raise KeyError(f"no adapter leaves for {path}; were they made for other targets?")
        own = adapted.adapter.prepare(site_leaves(leaves, path), _readable_kernels(params, adapted))
        for tree, part in zip(trees, own, strict=True):
            if part:
                tree[path] = part
    return Leaves(*trees)


def join(
    plan: AdapterPlan, params: Mapping[str, Any], leaves: Leaves, probes: Mapping[str, Mapping[str, Array]]
) -> dict[str, Any]:
    """Base parameters with every site's leaves under the reserved key of its module, as the model's scans expect."""
    joined = dict(params)
    for adapted in plan.sites:
        path = adapted.site.path
        own = site_leaves(leaves, path)
        layers = jnp.arange(adapted.site.num_layers, dtype=jnp.int32).reshape(*adapted.stack_sizes, 1)
        bundle = {**own._asdict(), "layer": layers, "probes": dict(probes.get(path, {}))}
        bundle = jax.tree.map(lambda v, a=adapted: _layer_axes_stored(v, a.lifted_positions), bundle)
        joined = set_path(joined, (*path.split("/"), RESERVED), bundle)
    for path, adapted in plan.gates.items():
        bundle = {"params": leaves.params[path], "probes": dict(probes.get(path, {}))}
        bundle = jax.tree.map(lambda v, a=adapted: _layer_axes_stored(v, a.stack_positions), bundle)
        joined = set_path(joined, (*path.split("/"), RESERVED), bundle)
    for path in plan.trained_modules:
        module_path = tuple(path.split("/"))
        old = get_path(params, module_path)
        joined = set_path(joined, module_path, meta.replace_boxed(old, leaves.params[path]))
    return joined


def init_probes(plan: AdapterPlan, num_tasks: int = 0) -> dict[str, dict[str, Array]]:
    """Zeros whose gradients are the methods' statistics, summed over tokens: {path: {name: (layers..., ...)}}."""
    probes = {}
    inputs = AdapterInputs(task_ids=jnp.zeros((1, 1), jnp.int32), num_tasks=num_tasks)
    for adapted in plan.sites:
        method, path = adapted.adapter, adapted.gate_path or adapted.site.path
        if path in probes:
            continue

        def shapes(method=method, site=adapted.site) -> dict[str, Array]:
            if not method.num_gates:
                return method.statistics(Leaves({}), jnp.zeros((1, 1, site.in_features)), None, inputs)
            gates = jnp.full((1, 1, method.num_gates), 1 / method.num_gates)
            found = method.statistics(Leaves({}), gates, gates, inputs)
            if found and method.balance(gates, None) is not None:
                found["balance"] = jnp.zeros((1,))
            return found

        found = jax.eval_shape(shapes)
        if found:
            probes[path] = {k: jnp.zeros((*adapted.stack_sizes, *v.shape), jnp.float32) for k, v in found.items()}
    return probes


def adapter_specs(plan: AdapterPlan, param_specs: Mapping[str, Any]) -> dict[str, Any]:
    """Partition specs for the trained leaves: input axes follow the kernel's inputs, output axes its outputs.

    Ranks and experts are never sharded, nor is a factor's axis when the kernel's is split over several axes.

    Args:
        plan: From ``resolve_sites``.
        param_specs: A tree like the base parameters with a ``PartitionSpec`` at each leaf.
    """
    specs: dict[str, Any] = {}
    for adapted in plan.sites:
        stored = tuple(get_path(param_specs, adapted.kernel_path))
        ndim = len(adapted.in_axes + adapted.out_axes) + len(adapted.stack_positions)
        stored = stored + (None,) * (ndim - len(stored))
        own = [axis for i, axis in enumerate(stored) if i not in adapted.stack_positions]
        layers = [stored[i] for i in adapted.stack_positions]
        named = {None: None, "in": None, "out": None}
        for name, axes in (("in", adapted.in_axes), ("out", adapted.out_axes)):
            named[name] = own[axes[0]] if len(axes) == 1 else None
        logical = adapted.adapter.logical_axes(adapted.site)
        specs[adapted.site.path] = {k: PartitionSpec(*layers, *(named[a] for a in v)) for k, v in logical.items()}
    for path, adapted in plan.gates.items():
        names = jax.eval_shape(lambda a=adapted: a.adapter.init_gate(jax.random.key(0), a.gate_features))
        specs[path] = {name: PartitionSpec() for name in names}
    for path in plan.trained_modules:
        specs[path] = get_path(param_specs, tuple(path.split("/")))
    return specs


def count_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
