"""What calibration needs to know of a running model: sums over tokens at every site, taken out as gradients.

``Capture`` wraps a method. Its delta is the method's own, and passes through an identity whose backward rule hands sums
of x and delta to zero leaves beside the method's: those come out of any scan and remat as the zero leaves' gradients.

Paired batches carry two streams, [routed rows; merged rows], through one pass: in the second half, layers that are
already merged use their merged change. So the inputs of a half-merged model meet the targets of the routed one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.injection import Adapted, AdaptedSite, AdapterPlan
from mor_jax.injection.adapted import emit

Batch = Mapping[str, Any]
ModelCall = Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any], AdapterInputs]]
EXTRA = "calibration_"  # begins the names of the leaves added here


def language_model_call(batch: Batch, num_tasks: int = 0) -> tuple[tuple[Any, ...], dict[str, Any], AdapterInputs]:
    """A batch of token rows as the model's arguments, its keyword arguments and the adapters' inputs.

    Args:
        batch: (B, S) int32 arrays: input_ids, and where known positions, segment_ids (0 is padding), task_ids,
            prompt_mask, token_type_ids (encoders).
        num_tasks: How many tasks statistics tell apart.
    """
    known = {name: jnp.asarray(batch[name]) for name in ("positions", "segment_ids") if name in batch}
    marks: dict[str, Any] = {name: jnp.asarray(batch[name]) for name in ("task_ids", "prompt_mask") if name in batch}
    pairs = {name: jnp.asarray(batch[name]) for name in ("token_type_ids",) if name in batch}
    return (jnp.asarray(batch["input_ids"]),), known | pairs, AdapterInputs(**known, **marks, num_tasks=num_tasks)


def forward(
    model: nn.Module, plan: AdapterPlan, params: Any, leaves: Leaves, batch: Batch, call: ModelCall, probes: Any = None
) -> Any:
    """The adapted model's output on a batch."""
    args, kwargs, inputs = call(batch)
    variables = {
        "params": params,
        "adapters": leaves.params,
        "adapter_state": leaves.state,
        "adapter_constants": leaves.constants,
    }
    if probes is not None:
        variables["adapter_probes"] = probes
    return Adapted(base=model, plan=plan).apply(variables, *args, adapter_inputs=inputs, **kwargs)


def through_probes(run: Callable[[Any], Any], probes: Any) -> Any:
    """The sums that a pass leaves in its probes: the gradient of nothing at all."""
    return jax.grad(lambda probes: 0.0 * sum(jnp.sum(out.astype(jnp.float32)) for out in jax.tree.leaves(run(probes))))(
        probes
    )


@dataclass(frozen=True, kw_only=True)
class Capture(Adapter):
    """A method that also reports on its inputs and outputs.

    Attributes:
        inner: The method.
        paired: Whether batches are [routed rows; merged rows].
        errors: Report ||x D - delta||^2 and ||delta||^2 for a given D instead of E[x^T x] and E[x^T delta].
    """

    inner: Adapter
    paired: bool = False
    errors: bool = False

    @property
    def gate_block(self) -> str | None:
        """The method's."""
        return self.inner.gate_block

    @property
    def num_gates(self) -> int:
        """The method's."""
        return self.inner.num_gates

    @property
    def routed(self) -> bool:
        """The method's."""
        return self.inner.routed

    @property
    def chained(self) -> bool:
        """The method's."""
        return self.inner.chained

    @property
    def linked(self) -> bool:
        """The method's."""
        return self.inner.linked

    def link(self, leaves: Leaves) -> Leaves:
        """The method's leaves linked, ours untouched."""
        linked = self.inner.link(_own(leaves))
        return linked._replace(params={**linked.params, **_extra(leaves)})

    def init_chain(self, site: Site, kept: tuple[int, ...], dtype: Any) -> Any:
        """The method's."""
        return self.inner.init_chain(site, kept, dtype)

    def prepare(self, leaves: Leaves, kernel: Kernel) -> Leaves:
        """The method's leaves prepared, ours untouched."""
        prepared = self.inner.prepare(_own(leaves), kernel)
        return prepared._replace(params={**prepared.params, **_extra(leaves)})

    def gate(self, leaves: Leaves, h: Array, inputs: AdapterInputs) -> Array | None:
        """The method's gate; h: (..., in)."""
        return self.inner.gate(_own(leaves), h if self.gate_block else self._factored(leaves, h), inputs)

    def delta(
        self,
        leaves: Leaves,
        x: Array,
        base_output: Array,
        kernel: Kernel,
        gates: Array | None,
        inputs: AdapterInputs,
    ) -> Array | tuple[Array, Any]:
        """The method's delta (in merged rows of merged layers: x D), with the sums of this call in its gradient."""
        extra = _extra(leaves)
        delta: Any = self.inner.delta(_own(leaves), self._factored(leaves, x), base_output, kernel, gates, inputs)
        chain = None
        if inputs.chain is not None:
            delta, chain = delta
        change = extra.get(EXTRA + "change")
        weight = _token_weight(inputs, x)
        seen, target = x, delta
        if self.paired:
            assert change is not None
            half = x.shape[0] // 2
            seen, target, weight = x[half:], delta[:half], weight[half:]
            merged = jnp.where(extra[EXTRA + "merged"][0] > 0, (seen @ change.astype(x.dtype)), delta[half:])
            delta = jnp.concatenate([target, merged.astype(delta.dtype)])
        sums = jax.lax.stop_gradient((seen, target))
        compute = _errors if self.errors else _moments
        shapes = jax.eval_shape(compute, *sums, weight, change)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        statistics = jax.lax.cond(extra[EXTRA + "wanted"][0] > 0, lambda: compute(*sums, weight, change), lambda: zeros)
        probes = {name: extra[EXTRA + name] for name in statistics}
        delta = emit(delta, probes, statistics)
        return delta if chain is None else (delta, chain)

    def _factored(self, leaves: Leaves, x: Array) -> Array:
        factor = self.inner.input_factor(_own(leaves))
        if factor is None:
            return x
        return jnp.matmul(x, factor.astype(x.dtype), preferred_element_type=jnp.float32)

    def num_params(self, site: Site) -> int:
        """The method's."""
        return self.inner.num_params(site)


def _own(leaves: Leaves) -> Leaves:
    return leaves._replace(params={k: v for k, v in leaves.params.items() if not k.startswith(EXTRA)})


def _extra(leaves: Leaves) -> dict[str, Array]:
    return {k: v for k, v in leaves.params.items() if k.startswith(EXTRA)}


def _token_weight(inputs: AdapterInputs, x: Array) -> Array:
    """(..., 1) float32: 0 on padding."""
    if inputs.segment_ids is None:
        return jnp.ones((*x.shape[:-1], 1), jnp.float32)
    return (inputs.segment_ids > 0).astype(jnp.float32).reshape(*x.shape[:-1], 1)


def _moments(x: Array, target: Array, weight: Array, change: Array | None) -> dict[str, Array]:
    """Sums over tokens of x^T x: (in, in), x^T delta: (in, out) and 1: (1,), float32."""
    weighted = (x.astype(jnp.float32) * weight).reshape(-1, x.shape[-1])
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    target = target.astype(jnp.float32).reshape(-1, target.shape[-1])
    product = lambda left, right: jnp.matmul(left.T, right, precision="highest")  # noqa: E731
    return {"xx": product(weighted, x), "xd": product(weighted, target), "count": weight.sum()[None]}


def _errors(x: Array, target: Array, weight: Array, change: Array | None) -> dict[str, Array]:
    """Sums over tokens of ||x D - delta||^2 and ||delta||^2, (1,) float32 each."""
    assert change is not None
    target = target.astype(jnp.float32)
    miss = jnp.matmul(x.astype(jnp.float32), change, precision="highest") - target
    return {
        "error": (jnp.square(miss) * weight).sum()[None],
        "norm": (jnp.square(target) * weight).sum()[None],
    }


class SiteControls(NamedTuple):
    """What ``collect`` is told of one site, layer axes leading."""

    wanted: Array  # (layers..., 1): 1 where sums are wanted
    merged: Array | None = None  # (layers..., 1): 1 where the layer is merged
    change: Array | None = None  # (layers..., in, out) float32, the merged change D


def _probe_shapes(adapted: AdaptedSite, errors: bool) -> dict[str, tuple[int, ...]]:
    site = adapted.site
    if errors:
        own: dict[str, tuple[int, ...]] = {"error": (1,), "norm": (1,)}
    else:
        features = site.in_features
        own = {"xx": (features, features), "xd": (features, site.out_features), "count": (1,)}
    return {name: (*adapted.stack_sizes, *shape) for name, shape in own.items()}


def capturing(plan: AdapterPlan, paths: Sequence[str], paired: bool = False, errors: bool = False) -> AdapterPlan:
    """The plan with the methods at ``paths`` wrapped in ``Capture``."""
    sites = []
    for adapted in plan.sites:
        if adapted.site.path in paths:
            wrapped = Capture(inner=adapted.adapter, paired=paired, errors=errors)
            adapted = dataclasses.replace(adapted, adapter=wrapped)
        sites.append(dataclasses.replace(adapted, group=()))
    return dataclasses.replace(plan, sites=tuple(sites))


@functools.partial(jax.jit, static_argnames=("model", "watched", "call", "paired"))
def _add_batch(
    model: nn.Module,
    watched: AdapterPlan,
    call: ModelCall,
    paired: bool,
    params: Any,
    leaves: Leaves,
    controls: Mapping[str, SiteControls],
    batch: Batch,
    total: Any,
) -> Any:
    """``total`` and the sums of one more batch; compiled once for each model, plan and shape."""
    if paired:
        batch = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)

    def run(probes: Any) -> Any:
        own: dict[str, Any] = dict(leaves.params)
        for path, control in controls.items():
            given = {k: v for k, v in control._asdict().items() if v is not None}
            extra = {EXTRA + name: value for name, value in {**given, **probes[path]}.items()}
            own[path] = {**own[path], **extra}
        return forward(model, watched, params, leaves._replace(params=own), batch, call)

    zeros = jax.tree.map(jnp.zeros_like, total)
    return jax.tree.map(jnp.add, total, through_probes(run, zeros))


def make_collector(
    model: nn.Module,
    plan: AdapterPlan,
    paths: Sequence[str],
    call: ModelCall,
    paired: bool = False,
    errors: bool = False,
) -> Callable[[Any, Leaves, Mapping[str, SiteControls], Iterable[Batch]], dict[str, dict[str, Array]]]:
    """A function that runs batches and adds up the sums of the sites ``paths``.

    Returns:
        (params, leaves, {path: controls}, batches) -> {path: {sum: (layers..., ...) float32}}. Sums are "xx", "xd" and
        "count", or with ``errors`` "error" and "norm".
    """
    watched = capturing(plan, paths, paired, errors)

    def collect(params, leaves, controls, batches):
        total: Any = {
            path: {name: jnp.zeros(shape) for name, shape in _probe_shapes(plan[path], errors).items()}
            for path in paths
        }
        for batch in batches:
            arrays = {name: jnp.asarray(value) for name, value in batch.items()}
            total = _add_batch(model, watched, call, paired, params, leaves, controls, arrays, total)
        return total

    return collect


def controls_for(
    adapted: AdaptedSite, wanted: Array | None = None, merged: Array | None = None, change: Array | None = None
) -> SiteControls:
    """``SiteControls`` that want every layer unless told otherwise."""
    every = jnp.ones((*adapted.stack_sizes, 1))
    return SiteControls(every if wanted is None else wanted, merged, change)
