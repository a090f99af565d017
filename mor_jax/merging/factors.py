"""Any change that is a product of two thin factors as an ordinary LoRA, for formats that know no other method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from mor_jax.adapters import DoRA, Kernel, Leaves, LoRA, NotMergeable
from mor_jax.adapters.precision import full_precision
from mor_jax.injection import AdaptedSite, AdapterPlan, link_leaves, site_kernels
from mor_jax.injection.arguments import check_params
from mor_jax.injection.leaves import site_leaves, with_shared


@full_precision
def as_lora(plan: AdapterPlan, leaves: Leaves, params: Mapping[str, Any]) -> tuple[AdapterPlan, Leaves]:
    """The same change with every site a LoRA (rsLoRA, DoRA), exact but for rounding; works under a trace too.

    Args:
        plan: Where the adapters sit.
        leaves: Their arrays, layer axes leading.
        params: The frozen base.

    Returns:
        A plan whose other sites have ``LoRA(rank=k, alpha=k)`` for factors of k columns, and its leaves, float32.

    Raises:
        NotMergeable: a site's method is no constant product of two thin factors.
    """
    check_params(params, plan)
    linked = link_leaves(plan, leaves)
    others = [adapted for adapted in plan.sites if not isinstance(adapted.adapter, LoRA | DoRA)]
    return with_loras(plan, leaves, {adapted.site.path: _site_factors(adapted, linked, params) for adapted in others})


def with_loras(
    plan: AdapterPlan, leaves: Leaves, factors: Mapping[str, tuple[Array, Array]]
) -> tuple[AdapterPlan, Leaves]:
    """LoRAs in place of what some sites have, and without the gates and shared leaves that nobody reads any more.

    Args:
        plan: Where the adapters sit.
        leaves: Their arrays.
        factors: {site path: (a, b)}: (layers..., in, k) and (layers..., k, out).

    Returns:
        A plan with ``LoRA(rank=k, alpha=k)`` at the paths of ``factors``, and its leaves.
    """
    sites = []
    for adapted in plan.sites:
        if adapted.site.path in factors:
            rank = factors[adapted.site.path][0].shape[-1]
            lora = LoRA(rank=rank, alpha=float(rank))
            own = {"shared": "", "chain": "", "gate_path": None, "gate_features": 0}
            adapted = dataclasses.replace(adapted, adapter=lora, **own)
        sites.append(adapted)
    read = {path for s in sites for path in (s.site.path, s.gate_path, s.shared)} - set(factors)
    read.update(plan.trained_modules)
    params, state, constants = ({path: tree[path] for path in tree if path in read} for tree in leaves)
    loras: dict[str, Any] = {path: {"a": a, "b": b} for path, (a, b) in factors.items()}
    return dataclasses.replace(plan, sites=tuple(sites)), Leaves({**params, **loras}, state, constants)


def _site_factors(adapted: AdaptedSite, linked: Leaves, params: Mapping[str, Any]) -> tuple[Array, Array]:
    """(layers..., in, k) and (layers..., k, out)."""
    path, sizes = adapted.site.path, adapted.stack_sizes
    common = site_leaves(linked, adapted.shared) if adapted.shared else Leaves({})

    def one(own: Leaves, value: Array) -> tuple[Array, Array]:
        kernel = Kernel(value, adapted.in_axes, adapted.out_axes)
        pair = adapted.adapter.factors(with_shared(own, common), kernel)
        if pair is None:
            raise NotMergeable(
                f"{path}: what {adapted.adapter.title} adds is no constant product of two thin factors, so no LoRA "
                "equals it"
            )
        return pair

    depth, count = len(sizes), math.prod(sizes)
    arrays = site_leaves(linked, path), site_kernels(params, adapted).value
    if not depth:
        return one(*arrays)
    flat = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[depth:]), arrays)
    return jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), jax.vmap(one)(*flat))
