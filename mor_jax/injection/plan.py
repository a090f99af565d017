"""The static plan of where each adapter goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from jax import Array

from mor_jax.adapters import Adapter, Kernel, Site
from mor_jax.injection.linear import DEFAULT_KINDS, Contraction, LinearKind


@dataclass(frozen=True)
class AdaptedSite:
    """One linear module that gets an adapter.

    Attributes:
        site: Path and sizes.
        adapter: The method with its hyper-parameters.
        kernel_path: Path of the kernel in the base parameters.
        stack_positions: Axes of the stored kernel that tell its maps apart, layers and experts: first those that
            scans and vmaps added, then the module's own; () for a module that is one map.
        stack_sizes: Their sizes.
        in_axes: Contracted axes of one map's kernel, negative.
        out_axes: Produced axes, negative.
        gate_path: Path of the block whose input decides the gate, or None.
        gate_features: Width of that input.
        group: Paths of the sites that read the same x, itself included, when they share one matmul.
        shared: Name of the leaves that it has in common with other sites, or "".
        chain: Name that it has in common with the same map in other layers.
        own_axes: How many of the last stack axes the module sees itself, as batch axes of its kernel.
        expert_axes: Which of the stack axes lie side by side in one layer instead of being layers.
        contraction: Of the module's call on the example inputs.
        bias_leaf: Name of the bias.
        unmergeable: Why a change of the stored kernel is not the adapter's change of the output; "" where it is.
        kernel_seen: Whether the module sees the kernel that is stored.
    """

    site: Site
    adapter: Adapter
    kernel_path: tuple[str, ...]
    stack_positions: tuple[int, ...] = ()
    stack_sizes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)
    gate_path: str | None = None
    gate_features: int = 0
    group: tuple[str, ...] = ()
    shared: str = ""
    chain: str = ""
    own_axes: int = 0
    expert_axes: tuple[int, ...] = ()
    contraction: Contraction = Contraction()
    bias_leaf: str = "bias"
    unmergeable: str = ""
    kernel_seen: bool = True

    def kernel_of(self, value: Array) -> Kernel:
        """A view of the kernel of one of the site's maps."""
        return Kernel(value, self.in_axes, self.out_axes)

    @property
    def lifted_positions(self) -> tuple[int, ...]:
        """The stack positions that scans and vmaps added."""
        return self.stack_positions[: len(self.stack_positions) - self.own_axes]


@dataclass(frozen=True)
class AdapterPlan:
    """Everything static about an adapted model: hashable, so it may be closed over or passed as a static argument.

    Attributes:
        sites: Where the adapters go, in the model's order.
        trained_modules: Paths of modules that are trained whole.
        fuse: Whether sites that read the same x share one matmul.
        kinds: The table that the sites were found with. No part of equality: what it said is in the sites, and a
            function written in place would make each plan another, to be compiled anew.
        trained_shapes: (path, numbers) of each trained module.
        trained_ndims: (path of a leaf, axes that it has in one layer) of every leaf of the trained modules.
        skipped: (path, reason) of what the targets may have meant and did not get; no part of equality either.
    """

    sites: tuple[AdaptedSite, ...]
    trained_modules: tuple[str, ...] = ()
    fuse: bool = True
    kinds: tuple[LinearKind, ...] = field(default=DEFAULT_KINDS, compare=False)
    trained_shapes: tuple[tuple[str, int], ...] = ()
    trained_ndims: tuple[tuple[str, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __getitem__(self, path: str) -> AdaptedSite:
        """The site at ``path``."""
        return self._by_path[path]

    @functools.cached_property
    def _by_path(self) -> dict[str, AdaptedSite]:
        return {s.site.path: s for s in self.sites}

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all sites."""
        return tuple(self._by_path)

    @functools.cached_property
    def gates(self) -> dict[str, AdaptedSite]:
        """For each block that decides a gate, one of its sites."""
        found: dict[str, AdaptedSite] = {}
        for adapted in self.sites:
            if adapted.gate_path is not None:
                found.setdefault(adapted.gate_path, adapted)
        return found

    @functools.cached_property
    def shared(self) -> dict[str, tuple[AdaptedSite, ...]]:
        """For each name of shared leaves the sites that share them."""
        return _grouped((s.shared, s) for s in self.sites if s.shared)

    @functools.cached_property
    def chains(self) -> dict[str, tuple[AdaptedSite, ...]]:
        """For each chain its sites in the order of their layers: one stacked site, or one site a layer."""
        return _grouped((s.chain, s) for s in sorted(self.sites, key=lambda s: s.site.first_layer))

    @property
    def chained(self) -> tuple[str, ...]:
        """Names of the chains of more than one layer that are run as one through the model."""
        return tuple(
            name
            for name, sites in self.chains.items()
            if sites[0].adapter.chained and sum(s.site.layers for s in sites) > 1
        )

    @property
    def num_gate_sites(self) -> int:
        """How many gates there are over all sites or blocks and layers."""
        at_sites = sum(math.prod(s.stack_sizes) for s in self.sites if s.adapter.num_gates and s.gate_path is None)
        return at_sites + sum(math.prod(s.stack_sizes) for s in self.gates.values())

    def num_params(self) -> int:
        """Trained parameters: sites, block gates and trained modules."""
        sites = sum(s.adapter.num_params(s.site) for s in self.sites)
        gates = sum(math.prod(s.stack_sizes) * s.adapter.num_gate_params(s.gate_features) for s in self.gates.values())
        return sites + gates + sum(size for _, size in self.trained_shapes)


def _grouped(pairs: Iterable[tuple[str, AdaptedSite]]) -> dict[str, tuple[AdaptedSite, ...]]:
    found: dict[str, tuple[AdaptedSite, ...]] = {}
    for name, adapted in pairs:
        found[name] = (*found.get(name, ()), adapted)
    return found
