"""A whole model's adapter cut to a smaller rank, for methods that were trained to stand it."""

from __future__ import annotations

import dataclasses
from typing import Any

from mor_jax.adapters import Leaves
from mor_jax.injection.arguments import check_leaves
from mor_jax.injection.leaves import site_leaves
from mor_jax.injection.plan import AdaptedSite, AdapterPlan


def cut_to_rank(plan: AdapterPlan, leaves: Leaves, rank: int) -> tuple[AdapterPlan, Leaves]:
    """The plan and leaves of the smaller adapter; gates and trained modules stay.

    Raises:
        ValueError: a site's method has one rank only, or ``rank`` is out of its range; names the site.
    """
    check_leaves(leaves)
    sites: list[AdaptedSite] = []
    trees: tuple[dict[str, Any], ...] = tuple(dict(tree) for tree in leaves)
    for adapted in plan.sites:
        path = adapted.site.path
        try:
            adapter, own = adapted.adapter.at_rank(site_leaves(leaves, path), rank)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        sites.append(dataclasses.replace(adapted, adapter=adapter))
        for tree, part in zip(trees, own, strict=True):
            tree.pop(path, None)
            if part:
                tree[path] = part
    return dataclasses.replace(plan, sites=tuple(sites)), Leaves(*trees)
