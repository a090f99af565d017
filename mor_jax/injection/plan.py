"""Finding a model's linear modules by tracing it once, and the static plan of where each adapter goes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from mor_jax.adapters import Adapter, Site
from mor_jax.injection.linear import DEFAULT_KINDS, LinearKind, find_kind
from mor_jax.injection.targets import InjectionError, assign_adapters, nearest_names
from mor_jax.injection.trained import get_path, trained_ndims, trained_shapes

_LOGGER = logging.getLogger(__name__)
MARK = "layer_axes"
_MARK_SHAPE = (1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099)  # primes that no layer count equals


@dataclass(frozen=True)
class AdaptedSite:
    """One linear module that gets an adapter.

    Attributes:
        site: Path and sizes.
        adapter: The method with its hyper-parameters.
        kernel_path: Path of the kernel in the base parameters.
        stack_positions: Layer axes of the stored kernel; () for a module outside any scan.
        stack_sizes: Their sizes.
        in_axes: Contracted axes of one layer's kernel, negative.
        out_axes: Produced axes, negative.
        gate_path: Path of the block whose input decides the gate, or None.
        gate_features: Width of that input.
        group: Paths of the sites that read the same x, itself included, when they share one matmul.
        shared: Name of the leaves that it has in common with other sites, or "".
        chain: Name that it has in common with the same map in other layers.
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


@dataclass(frozen=True)
class AdapterPlan:
    """Everything static about an adapted model: hashable, so it may be closed over or passed as a static argument.

    Attributes:
        sites: The linear modules with adapters.
        trained_modules: Paths of the modules that are trained whole.
        fuse: Whether sites that read the same x share one matmul.
        kinds: The table of linear modules.
        trained_shapes: (path, numbers) of each trained module.
        trained_ndims: (path of a leaf, axes that it has in one layer) of every leaf of the trained modules.
    """

    sites: tuple[AdaptedSite, ...]
    trained_modules: tuple[str, ...] = ()
    fuse: bool = True
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS
    trained_shapes: tuple[tuple[str, int], ...] = ()
    trained_ndims: tuple[tuple[str, int], ...] = ()

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
            if sites[0].adapter.chained and sum(s.site.num_layers for s in sites) > 1
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


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module reads: its first array, by place or by name; its first argument where none is an array.

    Of a layer that is called with `(x, carry)` it is x. Some models' own linear classes take the contraction first:
    `module("BTD,DF->BTF", x)`.
    """
    given = [value[0] if isinstance(value, tuple) and value else value for value in (*args, *kwargs.values())]
    return next((value for value in given if hasattr(value, "shape")), given[0] if given else None)


@dataclass
class _Visit:
    kind: LinearKind
    shape: tuple[int, ...]  # of one layer's kernel
    contraction: Any
    x: Any  # kept alive, so that identity means sameness

    def shares(self, other: _Visit) -> bool:
        """Whether both multiply the last axis of the identical x."""
        return self.x is other.x and all(v.contraction.contracts_last_axis(v.x.ndim) for v in (self, other))


@dataclass
class _Discovery:
    kinds: tuple[LinearKind, ...]
    visits: dict[str, _Visit] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # of every module's first array argument
    ndims: dict[str, int] = field(default_factory=dict)  # axes of every parameter in one layer, by its path

    def intercept(self, next_fun, args, kwargs, context):
        """Records each linear module's visit."""
        module = context.module
        output = next_fun(*args, **kwargs)
        path = "/".join(module.path)
        self._note_axes(module, path)
        x = first_argument(args, kwargs)
        if context.method_name != "__call__" or not hasattr(x, "shape"):
            return output
        if x.ndim:
            self.widths.setdefault(path, x.shape[-1])
        kind = find_kind(module, self.kinds)
        if kind is not None and module.has_variable("params", kind.kernel_leaf):
            kernel = meta.unbox(module.get_variable("params", kind.kernel_leaf))
            self._mark_layer_axes(module, kernel.ndim)
            self.visits.setdefault(path, _Visit(kind, kernel.shape, kind.contraction(module, x, kernel.shape), x))
        return output

    def _note_axes(self, module: nn.Module, path: str) -> None:
        """The module's own parameters as it sees them; inside of a scan that comes before what the scan hands out."""
        for name, value in ({} if module.scope is None else module.variables.get("params", {})).items():
            if not isinstance(value, Mapping) and hasattr(meta.unbox(value), "ndim"):
                self.ndims.setdefault(f"{path}/{name}".lstrip("/"), meta.unbox(value).ndim)

    def _mark_layer_axes(self, module: nn.Module, ndim: int) -> None:
        """Leaves a shape of primes beside the kernel: what a scan adds to it are the layer axes, without ambiguity."""
        scope = module.scope
        if scope is not None and not scope.has_variable("params", MARK):
            scope.put_variable("params", MARK, jnp.zeros(_MARK_SHAPE[:ndim], bool))


def trace_shapes(model: nn.Module, interceptor, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    """The shapes of ``model.init``'s parameters, run abstractly under an interceptor.

    Arguments that have a shape are traced, all others are static.
    """
    values, tree = jax.tree.flatten((args, kwargs))
    traced = {i: jax.ShapeDtypeStruct(v.shape, v.dtype) for i, v in enumerate(values) if hasattr(v, "shape")}

    def run(key, traced):
        args, kwargs = jax.tree.unflatten(tree, [traced.get(i, value) for i, value in enumerate(values)])
        with nn.intercept_methods(interceptor):
            return model.init({"params": key, "dropout": key}, *args, **kwargs)

    return jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), traced)["params"]


def _matrix_modules(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[str]:
    found = []
    own = [v for name, v in tree.items() if not isinstance(v, Mapping) and name != MARK]
    if sum(meta.unbox(v).ndim >= 2 for v in own if hasattr(meta.unbox(v), "ndim")) == 1:
        found.append("/".join(prefix))
    for name, child in tree.items():
        if isinstance(child, Mapping):
            found += _matrix_modules(child, (*prefix, name))
    return found


def _gate_of(path: str, adapter: Adapter, widths: Mapping[str, int]) -> tuple[str | None, int]:
    if adapter.gate_block is None:
        return None, 0
    parts = path.split("/")
    for end in range(len(parts) - 1, 0, -1):
        block = "/".join(parts[:end])
        if re.fullmatch(adapter.gate_block, block) and block in widths:
            return block, widths[block]
    raise InjectionError(
        f"{path}: no enclosing module matches {adapter.gate_block!r}, whose input should decide the gate; "
        f"{nearest_names(adapter.gate_block, list(widths))}"
    )


_LAYER_NUMBER = re.compile(r"_(\d+)(?=/)")  # of layers that are modules of their own, as in layers_3/mlp/up_proj


def _place(path: str, paths: Iterable[str]) -> tuple[str, int, int]:
    """(the path without its layer number, its place among the ``paths`` that differ in the number alone, their count).

    A path without a number is the first of one.
    """
    found = _LAYER_NUMBER.search(path)
    if found is None:
        return path, 0, 0
    start, end = path[: found.start()], path[found.end() :]
    same = re.compile(re.escape(start) + r"_(\d+)" + re.escape(end))
    numbers = sorted(int(match[1]) for match in map(same.fullmatch, paths) if match)
    return start + end, numbers.index(int(found[1])), len(numbers)


def _name_groups(sites: list[AdaptedSite]) -> list[AdaptedSite]:
    """The sites with the names of what they share and of their chains: sites of different settings share nothing."""
    named: dict[tuple[str, Adapter], str] = {}

    def name(base: str, adapter: Adapter) -> str:
        count = sum(known == base for known, _ in named)
        return named.setdefault((base, adapter), base if not count else f"{base} {count + 1}")

    chained = [dataclasses.replace(s, chain=name(s.chain, s.adapter)) for s in sites]
    by_adapter: dict[Adapter, list[Site]] = {}
    for adapted in chained:
        by_adapter.setdefault(adapted.adapter, []).append(adapted.site)
    shares = {
        adapter: bool(jax.tree.leaves(jax.eval_shape(lambda a=adapter, s=own: a.shared(jax.random.key(0), tuple(s)))))
        for adapter, own in by_adapter.items()
    }
    return [
        dataclasses.replace(s, shared=name(f"shared/{s.adapter.name}", s.adapter) if shares[s.adapter] else "")
        for s in chained
    ]


def _without_marks(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_marks(child) if isinstance(child, Mapping) else child
        for name, child in tree.items()
        if name != MARK
    }


def _adapted_site(
    path: str, chosen: Mapping[str, Adapter], found: _Discovery, params: Mapping[str, Any], fuse: bool
) -> AdaptedSite:
    """The site at ``path``, but for the names of what it shares."""
    method, visit = chosen[path], found.visits[path]
    kernel_path = (*path.split("/"), visit.kind.kernel_leaf)
    stored = meta.unbox(get_path(params, kernel_path)).shape
    marked = get_path(params, (*kernel_path[:-1], MARK)).shape
    positions = tuple(i for i, size in enumerate(marked) if size not in _MARK_SHAPE)
    sizes = tuple(stored[p] for p in positions)
    in_axes, out_axes = visit.contraction.in_axes, visit.contraction.out_axes
    in_features, out_features = (math.prod(visit.shape[axis] for axis in axes) for axes in (in_axes, out_axes))
    gate_path, gate_features = _gate_of(path, method, found.widths)
    chain, first_layer, depth = _place(path, found.visits)
    return AdaptedSite(
        site=Site(path, in_features, out_features, math.prod(sizes), first_layer, depth),
        adapter=method,
        kernel_path=kernel_path,
        stack_positions=positions,
        stack_sizes=sizes,
        in_axes=in_axes,
        out_axes=out_axes,
        gate_path=gate_path,
        gate_features=gate_features,
        group=_readers(path, chosen, found.visits) if fuse and method.dropout == 0 else (),
        chain=chain,
    )


def _readers(path: str, chosen: Mapping[str, Adapter], visits: Mapping[str, _Visit]) -> tuple[str, ...]:
    """The sites beside ``path`` that read the identical x without dropout, itself among them; () if it is alone."""
    parent = path.rpartition("/")[0]
    beside = [other for other in chosen if other.rpartition("/")[0] == parent and chosen[other].dropout == 0]
    group = tuple(other for other in beside if visits[other].shares(visits[path]))
    return group if len(group) > 1 else ()


def resolve_sites(
    model: nn.Module,
    adapter: Adapter,
    targets: tuple[str, ...] | str,
    *args: Any,
    overrides: tuple[tuple[str, Adapter], ...] = (),
    trained_modules: tuple[str, ...] = (),
    fuse: bool = True,
    kinds: tuple[LinearKind, ...] = DEFAULT_KINDS,
    **kwargs: Any,
) -> AdapterPlan:
    """The plan for ``model``, found by tracing ``model.init(key, *args, **kwargs)`` abstractly: nothing is computed.

    What a method has to warn of at these sites (``Adapter.caution``) is logged, once a plan.

    Args:
        model: Any linen module.
        adapter: The method for all targets.
        targets: Hugging Face names, regular expressions over "/"-joined paths, or "all-linear" (all but the head).
        *args: Example inputs, arrays or ``jax.ShapeDtypeStruct``.
        overrides: (pattern, method) pairs for sites that get other settings or another method.
        trained_modules: Names of modules that are trained whole.
        fuse: Whether sites that read the same x share one matmul.
        kinds: The table of linear modules.
        **kwargs: More example inputs; those without a shape are static.

    Raises:
        InjectionError: if a pattern matches nothing, or two overrides conflict.
    """
    found = _Discovery(kinds)
    params = trace_shapes(model, found.intercept, *args, **kwargs)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [p for p in _matrix_modules(params) if p not in found.visits]
    chosen = assign_adapters(list(found.visits), unknown, adapter, targets, tuple(overrides))
    sites = [_adapted_site(path, chosen, found, params, fuse) for path in chosen]
    base = _without_marks(params)
    trained = trained_shapes(tuple(trained_modules), base, list(chosen))
    names = tuple(path for path, _ in trained)
    sites = tuple(_name_groups(sites))
    _warn(sites)
    return AdapterPlan(sites, names, fuse, kinds, trained, trained_ndims(names, base, found.ndims))


def _warn(sites: tuple[AdaptedSite, ...]) -> None:
    """Logs what the methods have to say of their sites, one sentence for each setting."""
    for method in dict.fromkeys(adapted.adapter for adapted in sites):
        message = method.caution(tuple(adapted.site for adapted in sites if adapted.adapter == method))
        if message:
            _LOGGER.warning("%s", message)
