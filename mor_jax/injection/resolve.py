"""From a model and its targets to the plan: what one trace of the model found, as sites."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from mor_jax.adapters import Adapter, Site
from mor_jax.injection.arguments import check_kinds, check_method, check_model, check_overrides
from mor_jax.injection.depth import depth_of
from mor_jax.injection.discovery import Discovery
from mor_jax.injection.heads import named_as_head
from mor_jax.injection.judgement import judge_sites
from mor_jax.injection.linear import DEFAULT_KINDS, LinearKind
from mor_jax.injection.plan import AdaptedSite, AdapterPlan
from mor_jax.injection.stacking import without_marks
from mor_jax.injection.targets import Candidates, InjectionError, assign_adapters, left_out, nearest_names
from mor_jax.injection.trained import get_path, trained_ndims, trained_shapes

_LOGGER = logging.getLogger(__name__)
_TOLD = 8  # modules that one line of the log names


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


def _name_groups(sites: list[AdaptedSite]) -> list[AdaptedSite]:
    """The sites with the names of what they share and of their chains: sites of different settings share nothing."""
    named: dict[tuple[str, Any], str] = {}

    def name(base: str, alike: Any) -> str:
        count = sum(known == base for known, _ in named)
        return named.setdefault((base, alike), base if not count else f"{base} {count + 1}")

    def of_chain(s: AdaptedSite) -> tuple[Any, ...]:
        return s.adapter, s.site.in_features, s.site.out_features, s.site.num_layers // s.site.layers

    chained = [dataclasses.replace(s, chain=name(s.chain, of_chain(s))) for s in sites]
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


def _lifted_axes(path: str, found: Discovery, stored: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """(positions in the stored kernel of the axes that scans and vmaps added, whether each is of layers).

    Raises:
        InjectionError: nothing explains an axis of the kernel, or what it is.
    """
    shape = found.visits[path].shape
    if stored == shape:  # nn.add_metadata_axis tells of an axis that is not there
        return [], []
    placed = found.stack(path).placed(len(shape))
    positions = [place for place, _ in placed]
    if tuple(size for i, size in enumerate(stored) if i not in positions) != shape:
        raise InjectionError(
            f"{path} is stored as {stored} and called with {shape}, which no nn.scan or nn.vmap explains: adapt the "
            "modules inside the transformation, or leave it out of the targets"
        )
    if any(layers is None for _, layers in placed):
        raise InjectionError(
            f"{path} runs under nn.scan and nn.vmap, only one of which stacks its parameters {stored}: name their axis "
            f"with metadata_params={{nn.PARTITION_NAME: 'layers'}}, or 'experts'"
        )
    return positions, [bool(layers) for _, layers in placed]


def _adapted_site(path: str, chosen: Mapping[str, Adapter], found: Discovery, fuse: bool) -> AdaptedSite:
    """The site at ``path``, but for the names of what it shares."""
    method, visit = chosen[path], found.visits[path]
    contraction = visit.contraction
    assert contraction is not None
    kernel_path = (*path.split("/"), visit.kind.kernel_leaf)
    stored = tuple(meta.unbox(get_path(found.params, kernel_path)).shape)
    lifted, layers = _lifted_axes(path, found, stored)
    own = [i for i in range(len(stored)) if i not in lifted]
    positions = (*lifted, *(own[axis] for axis in contraction.batch_axes))
    sizes = tuple(stored[p] for p in positions)
    is_layer = layers + [False] * len(contraction.batch_axes)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    layer_axes = tuple((strides[i], sizes[i]) for i in range(len(sizes)) if is_layer[i])
    in_axes, out_axes = contraction.one_map()
    in_features = math.prod(visit.shape[axis] for axis in contraction.in_axes)
    gate_path, gate_features = _gate_of(path, method, found.widths)
    if gate_path is not None and len(found.stack(gate_path).indices) != len(positions):
        raise InjectionError(
            f"{path} is several maps inside {gate_path}, whose one gate can't weigh each of them: use scope='site'"
        )
    place = depth_of(path, found)
    return AdaptedSite(
        site=Site(
            path,
            in_features,
            found.out_features(path),
            math.prod(sizes),
            place.first,
            place.depth,
            None if all(is_layer) else layer_axes,
        ),
        adapter=method,
        kernel_path=kernel_path,
        stack_positions=positions,
        stack_sizes=sizes,
        in_axes=in_axes,
        out_axes=out_axes,
        gate_path=gate_path,
        gate_features=gate_features,
        group=_readers(path, chosen, found) if fuse and method.dropout == 0 else (),
        chain=place.chain,
        own_axes=len(contraction.batch_axes),
        expert_axes=tuple(i for i, layer in enumerate(is_layer) if not layer),
        contraction=contraction,
        bias_leaf=visit.kind.bias_leaf,
    )


def _readers(path: str, chosen: Mapping[str, Adapter], found: Discovery) -> tuple[str, ...]:
    """The sites beside ``path`` that read the identical x without dropout, itself among them; () if it is alone."""
    parent = path.rpartition("/")[0]
    beside = [other for other in chosen if other.rpartition("/")[0] == parent and chosen[other].dropout == 0]
    group = tuple(other for other in beside if found.visits[other].shares(found.visits[path]))
    return group if len(group) > 1 else ()


def _judged(
    sites: list[AdaptedSite],
    model: nn.Module,
    kinds: tuple[LinearKind, ...],
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[AdaptedSite]:
    """The sites with what is known of their modules: whether an adapter may be folded into the stored kernel."""
    judged = judge_sites(model, kinds, sites, variables, args, kwargs)
    found = ((s, judged[s.site.path]) for s in sites)
    return [dataclasses.replace(s, unmergeable=own.reason, kernel_seen=own.kernel_seen) for s, own in found]


def _candidates(found: Discovery) -> tuple[Candidates, set[str]]:
    """(what the model has to adapt, paths of what nobody expects to be adapted)."""
    linear = tuple(path for path, visit in found.visits.items() if visit.contraction is not None and path)
    failed = {path: visit.error for path, visit in found.visits.items() if visit.error}
    if "" in found.visits and "" not in failed:
        failed[""] = "it is the model itself, which has no parent to hold an adapter: make it part of a module"
    heads = frozenset(path for path in linear if named_as_head(path) or path in found.heads)
    matrices = found.matrices()
    in_order = sorted(matrices, key=lambda path: matrices[path].ordinary)
    unknown = {path: matrices[path].reason for path in in_order}
    ordinary = heads | {path for path in matrices if matrices[path].ordinary}
    return Candidates(linear, heads, failed, unknown), set(ordinary)


def _tell(skipped: Mapping[str, str], ordinary: set[str]) -> None:
    """One line in the log about what was left out: a warning, unless nobody expects it to be adapted."""
    if skipped:
        level = logging.INFO if set(skipped) <= ordinary else logging.WARNING
        told = sorted(skipped, key=lambda path: path in ordinary)
        parts = [f"{path or 'the model itself'} ({skipped[path]})" for path in told[:_TOLD]]
        more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
        _LOGGER.log(level, "not adapted: %s", "; ".join(parts + more))


def _warn(sites: tuple[AdaptedSite, ...]) -> None:
    """Logs what the methods have to say of their sites, one sentence for each setting."""
    for method in dict.fromkeys(adapted.adapter for adapted in sites):
        message = method.caution(tuple(adapted.site for adapted in sites if adapted.adapter == method))
        if message:
            _LOGGER.warning("%s", message)


def _check_chains(plan: AdapterPlan) -> AdapterPlan:
    """The plan.

    Raises:
        InjectionError: a method would hand activations on from one layer's experts to another's.
    """
    for name in plan.chained:
        first = plan.chains[name][0]
        if first.expert_axes:
            raise InjectionError(
                f"{first.site.path} has experts side by side, and {first.adapter.title} hands activations on from "
                "layer to layer, which experts do not share; choose form='block'"
            )
    return plan


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

    But for linear modules of unknown arithmetic, each of which is called alone on a few rows of whole numbers: whether
    it is x @ kernel + bias decides whether an adapter can be merged (``AdaptedSite.unmergeable``).

    What a method has to warn of at these sites (``Adapter.caution``) is logged, once a plan.

    Args:
        model: Any linen module.
        adapter: The method for all targets.
        targets: Hugging Face names, regular expressions over "/"-joined paths, or "all-linear" (all but the head; what
            else it leaves out stands in ``AdapterPlan.skipped`` and in the log).
        *args: Example inputs, arrays or ``jax.ShapeDtypeStruct``.
        overrides: (pattern, method) pairs for sites that get other settings or another method.
        trained_modules: Names of modules that are trained whole.
        fuse: Whether sites that read the same x share one matmul.
        kinds: The table of linear modules; ``(LinearKind(...), *DEFAULT_KINDS)`` adds one.
        **kwargs: More example inputs; those without a shape are static.

    Raises:
        InjectionError: if a pattern matches nothing or what is not one linear map, two overrides conflict, an argument
            is of another type, a method can't adapt a module's experts, or an adapter would not reach its module.
    """
    check_model(model)
    check_method(adapter)
    kinds, overrides = check_kinds(kinds), check_overrides(overrides)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    trained_modules = (trained_modules,) if isinstance(trained_modules, str) else tuple(trained_modules)
    methods = (adapter, *(method for _, method in overrides))
    found = Discovery(kinds, tuple(method.gate_block for method in methods if method.gate_block is not None))
    found.run(model, *args, **kwargs)
    candidates, ordinary = _candidates(found)
    chosen = assign_adapters(candidates, adapter, targets, overrides)
    sites = [_adapted_site(path, chosen, found, fuse) for path in chosen]
    base = without_marks(found.params)
    trained = trained_shapes(trained_modules, base, list(chosen))
    names = tuple(path for path, _ in trained)
    skipped = left_out(candidates, targets, chosen)
    skipped = {path: why for path, why in skipped.items() if path not in names}
    plan = AdapterPlan(
        tuple(_judged(_name_groups(sites), model, kinds, {**found.collections, "params": base}, args, kwargs)),
        names,
        fuse,
        kinds,
        trained,
        trained_ndims(names, base, found.ndims),
        tuple(skipped.items()),
    )
    _tell(skipped, ordinary)
    _warn(plan.sites)
    return _check_chains(plan)
