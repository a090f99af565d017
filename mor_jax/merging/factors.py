"""Any change that is a product of two thin factors as an ordinary LoRA, for formats that know no other method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from mor_jax.adapters import DoRA, Kernel, Leaves, LoRA, NotMergeable
from mor_jax.injection import AdaptedSite, AdapterPlan, link_leaves, site_kernels
from mor_jax.injection.leaves import site_leaves, with_shared


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
    linked = link_leaves(plan, leaves)
    kept: dict[str, Any] = {path: own for path, own in leaves.params.items() if path in plan.trained_modules}
    sites = []
    for adapted in plan.sites:
        path = adapted.site.path
        if isinstance(adapted.adapter, LoRA | DoRA):
            kept[path] = leaves.params[path]
            sites.append(adapted)
            continue
        a, b = _site_factors(adapted, linked, params)
        kept[path] = {"a": a, "b": b}
        lora = LoRA(rank=a.shape[-1], alpha=float(a.shape[-1]))
        sites.append(dataclasses.replace(adapted, adapter=lora, shared="", chain="", gate_path=None, gate_features=0))
    return dataclasses.replace(plan, sites=tuple(sites)), Leaves(kept)


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
