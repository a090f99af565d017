"""Adapters inside any Flax model: finding sites, joining trees, running the methods."""

from mor_jax.injection.adapted import Adapted
from mor_jax.injection.leaves import (
    adapter_specs,
    count_bytes,
    init_leaves,
    init_probes,
    join,
    link_leaves,
    over_layers,
    prepare_leaves,
    replace_site_kernels,
    site_kernels,
)
from mor_jax.injection.linear import DEFAULT_KINDS, Contraction, LinearKind, einsum_contraction
from mor_jax.injection.plan import AdaptedSite, AdapterPlan
from mor_jax.injection.ranks import cut_to_rank
from mor_jax.injection.resolve import resolve_sites
from mor_jax.injection.targets import ALL_LINEAR, InjectionError
from mor_jax.injection.trained import get_path

__all__ = [
    "ALL_LINEAR",
    "DEFAULT_KINDS",
    "Adapted",
    "AdaptedSite",
    "AdapterPlan",
    "Contraction",
    "InjectionError",
    "LinearKind",
    "adapter_specs",
    "count_bytes",
    "cut_to_rank",
    "einsum_contraction",
    "get_path",
    "init_leaves",
    "init_probes",
    "join",
    "link_leaves",
    "over_layers",
    "prepare_leaves",
    "replace_site_kernels",
    "resolve_sites",
    "site_kernels",
]
