"""Adapters folded into the frozen kernels: layer by layer in float32, rounded once, in the layout the model stores.

    W' = round(float32(W) + change)      one layer at a time, so the peak is the base plus one layer

Methods whose gate reads the input have no such kernel; with constant ``gates`` they are merged as if those were it.
There is no way back: keep the base.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array
from jax.core import Tracer

from mor_jax.adapters import Adapter, Kernel, Leaves, NotMergeable
from mor_jax.adapters.precision import full_precision
from mor_jax.injection import AdaptedSite, AdapterPlan, get_path, link_leaves, replace_site_kernels, site_kernels
from mor_jax.injection.arguments import check_leaves, check_params
from mor_jax.injection.leaves import set_path, site_leaves, with_shared

Params = Mapping[str, Any]


def gate_key(adapted: AdaptedSite) -> str:
    """Where a site's constant gates are looked up: its block's path, or its own."""
    return adapted.gate_path or adapted.site.path


def sharding_of(value: Any) -> Any:
    """The sharding of a concrete array over a mesh, else None."""
    sharding = None if isinstance(value, Tracer) else getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def refuse_unfaithful(params: Params, plan: AdapterPlan) -> None:
    """Raises NotMergeable at the first site where a change of the stored kernel is not the adapter's change."""
    for adapted in plan.sites:
        _refuse(params, adapted)


def _refuse(params: Params, adapted: AdaptedSite) -> None:
    reason, dtype = adapted.unmergeable, meta.unbox(get_path(params, adapted.kernel_path)).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        reason = f"its kernel is stored as {dtype}, in which a change would be rounded away"
    if reason:
        raise NotMergeable(
            f"{adapted.site.path}: {reason}, so no stored kernel holds the adapter; keep the adapter beside the base, "
            "or exclude this module from the targets"
        )


def update_site(
    params: Params, adapted: AdaptedSite, change: Callable[..., Array], *arrays: Any, **common: Any
) -> dict[str, Any]:
    """``params`` with one site's kernels changed, one layer at a time.

    Args:
        params: Base parameters.
        adapted: The site.
        change: (``Kernel`` of one layer, *arrays of one layer) -> that layer's kernel in its own layout and dtype;
            hashable, and equal ones compile once.
        *arrays: Pytrees whose leaves have the site's layer axes leading.
        **common: Pytrees that every layer gets whole.

    Returns:
        A copy of the dictionaries along the kernel's path; dtype, boxes and sharding of the kernel stay.

    Raises:
        NotMergeable: if the module is not known to multiply x by the stored kernel and nothing else.
    """
    _refuse(params, adapted)
    old = get_path(params, adapted.kernel_path)
    program, branch = _site_update(params, adapted, change)
    merged = program(branch, arrays, common)
    return set_path(params, adapted.kernel_path, meta.replace_boxed(old, merged))


def _site_update(params: Params, adapted: AdaptedSite, change: Callable[..., Array]) -> tuple[Any, dict[str, Any]]:
    """(the compiled update of a site, its branch of the parameters: its first argument)."""
    old = get_path(params, adapted.kernel_path)
    own: dict[str, Any] = set_path({}, adapted.kernel_path, old)
    return _compiled_update(adapted, change, sharding_of(meta.unbox(old))), own


@functools.lru_cache(maxsize=256)
def _compiled_update(adapted: AdaptedSite, change: Callable[..., Array], sharding: Any) -> Any:
    """(one site's branch of the parameters, arrays by layer, arrays of all layers) -> its new kernel."""
    sizes = adapted.stack_sizes
    count, depth = math.prod(sizes), len(sizes)

    @full_precision
    def run(params: Params, arrays: Any, common: Mapping[str, Any]) -> Array:
        stacked = site_kernels(params, adapted).value

        def one(parts: Any) -> Array:
            value, own = parts
            return change(Kernel(value, adapted.in_axes, adapted.out_axes), *own, **common)

        if not depth:
            new = one((stacked, arrays))
        else:
            flat = jax.tree.map(lambda v: v.reshape(count, *v.shape[depth:]), (stacked, arrays))
            new = jax.lax.map(one, flat).reshape(stacked.shape)
        return meta.unbox(get_path(replace_site_kernels(params, adapted, new), adapted.kernel_path))

    return jax.jit(run, out_shardings=sharding)


@dataclass(frozen=True)
class _Fold:
    """A method's merge of one layer."""

    adapter: Adapter

    def __call__(self, kernel: Kernel, own: Leaves, gates: Array | None = None, *, common: Leaves) -> Array:
        return self.adapter.merge(with_shared(own, common), kernel, gates)


def add_change(kernel: Kernel, change: Array) -> Array:
    """The kernel plus a change (in, out), summed in float32 and rounded once."""
    return kernel.replace(kernel.dense() + change)


def merge_site(
    params: Params, leaves: Leaves, adapted: AdaptedSite, gates: Mapping[str, Array] | None = None
) -> dict[str, Any]:
    """``merge`` of a single site.

    Args:
        params: The frozen base.
        leaves: All adapters, linked (``link_leaves``).
        adapted: The site.
        gates: As for ``merge``.

    Raises:
        NotMergeable: if the method has no exact merge and ``gates`` has none for it, or it does not want to be merged;
            or as for ``update_site``.
    """
    path = adapted.site.path
    _refuse(params, adapted)
    own = site_leaves(leaves, path)
    if not own.params:
        raise KeyError(f"no adapter leaves for {path}; were they made for other targets?")
    constant = (gates or {}).get(gate_key(adapted))
    common = site_leaves(leaves, adapted.shared) if adapted.shared else Leaves({})
    if adapted.adapter.merges_exactly or constant is None:
        try:
            return update_site(params, adapted, _Fold(adapted.adapter), own, common=common)
        except NotMergeable as error:
            raise NotMergeable(f"{path}: {error}") from error
    expected = _gates_shape(adapted)
    if constant.shape != expected:
        raise ValueError(f"gates of {gate_key(adapted)} have shape {constant.shape}, expected {expected}")
    return update_site(params, adapted, _Fold(adapted.adapter), own, jnp.asarray(constant, jnp.float32), common=common)


def lower_merge(params: Params, leaves: Leaves, plan: AdapterPlan) -> Iterator[tuple[AdaptedSite, jax.stages.Lowered]]:
    """The programs that ``merge`` runs one after the other, from shapes with shardings; nothing is allocated.

    Sites whose method has no exact merge are folded with constant gates, as every approximate merge but least squares
    does in the end.

    Args:
        params: The frozen base, ``ShapeDtypeStruct``s.
        leaves: All adapters, likewise.
        plan: From ``resolve_sites``.

    Yields:
        (site, its program), in the order of the plan.

    Raises:
        NotMergeable: at a site that does not want to be merged, or cannot be.
    """
    if any(sites[0].adapter.linked for sites in plan.chains.values()):
        leaves = jax.eval_shape(lambda own: link_leaves(plan, own), leaves)
    for adapted in plan.sites:
        own = site_leaves(leaves, adapted.site.path)
        common = site_leaves(leaves, adapted.shared) if adapted.shared else Leaves({})
        _refuse(params, adapted)
        gates = () if adapted.adapter.merges_exactly else (jax.ShapeDtypeStruct(_gates_shape(adapted), jnp.float32),)
        program, branch = _site_update(params, adapted, _Fold(adapted.adapter))
        yield adapted, program.lower(branch, (own, *gates), {"common": common})


def _gates_shape(adapted: AdaptedSite) -> tuple[int, ...]:
    """(layers..., N), with N = 1 where only the share of earlier layers is constant."""
    return (*adapted.stack_sizes, adapted.adapter.num_gates or 1)


def merge_trained_modules(params: Params, leaves: Leaves, plan: AdapterPlan) -> dict[str, Any]:
    """``params`` with every module that was trained whole replaced, in the base's dtype and sharding."""

    def replace(old: Any, new: Any) -> Any:
        value = jnp.asarray(new).astype(old.dtype)
        return value if sharding_of(old) is None else jax.device_put(value, old.sharding)

    merged = dict(params)
    for path in plan.trained_modules:
        where = tuple(path.split("/"))
        old = get_path(params, where)
        new = jax.tree.map(replace, meta.unbox(old), leaves.params[path])
        merged = set_path(merged, where, meta.replace_boxed(old, new))
    return merged


def merge(
    params: Params, leaves: Leaves, plan: AdapterPlan, gates: Mapping[str, Array] | None = None
) -> dict[str, Any]:
    """Base parameters with all adapters folded in: same structure, dtypes and shardings; ``params`` is not changed.

    Args:
        params: The frozen base.
        leaves: The adapters, layer axes leading.
        plan: From ``resolve_sites``.
        gates: Constant gates, {gate path: (layers..., N)}, for methods whose gate depends on the input; and
            for chains of layers, {site: (layers..., 1)}, from ``earlier_shares``.

    Raises:
        NotMergeable: if such a method has none, or if a module does other things than multiply x by the kernel that is
            stored; the message names the site and what to do instead. ``check_merge`` compares the result.
        InjectionError: if ``params`` or ``leaves`` is something else.
    """
    check_params(params, plan)
    check_leaves(leaves)
    refuse_unfaithful(params, plan)
    merged, leaves = dict(params), link_leaves(plan, leaves)
    for adapted in plan.sites:
        merged = merge_site(merged, leaves, adapted, gates)
    return merge_trained_modules(merged, leaves, plan)
