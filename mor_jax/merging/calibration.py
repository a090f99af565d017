"""What calibration needs to know of a running model: sums over tokens at every site, taken out as gradients.

``Capture`` wraps a method. Its delta is the method's own, and passes through an identity whose backward rule hands sums
of x and delta to zero leaves beside the method's: those come out of any scan and remat as the zero leaves' gradients.

A sequential pass carries two streams, [routed rows; merged rows]: each site solves for its change as the pass reaches
it, from what it puts out in the first half and gets in the second, and uses that change in the second half from there
on. So the inputs of a merged model meet the targets of the routed one, in one pass whatever the number of layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from mor_jax.adapters import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.precision import full_precision
from mor_jax.injection import Adapted, AdaptedSite, AdapterPlan
from mor_jax.injection.carriers import emit

Batch = Mapping[str, Any]
ModelCall = Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any], AdapterInputs]]
Kind = Literal["moments", "errors", "sequential"]
EXTRA = "calibration_"  # begins the names of the leaves added here
RIDGE = 1e-4


def solve_ridge(second_moment: Any, cross: Any, ridge: float = RIDGE) -> Array:
    """(C + ridge tr(C) / in I)^-1 R, solved in float64, as (in, out) float32; zeros where no input was ever seen.

    Args:
        second_moment: C = E[x^T x]: (in, in).
        cross: R = E[x^T delta]: (in, out).
        ridge: How much of the mean eigenvalue is added to the diagonal.
    """
    arguments = jnp.asarray(second_moment, jnp.float32), jnp.asarray(cross, jnp.float32)
    device, host = functools.partial(_solve_on_device, ridge), functools.partial(_solve_on_host, ridge)
    return jax.lax.platform_dependent(*arguments, tpu=host, default=device)


def _solve_on_device(ridge: float, moment: Array, cross: Array) -> Array:
    with jax.enable_x64(True):  # moments of activations are too ill-conditioned for float32
        moment, target = moment.astype(jnp.float64), cross.astype(jnp.float64)
        eps = ridge * jnp.trace(moment) / len(moment)
        regular = moment + jnp.where(eps > 0, eps, 1.0) * jnp.eye(len(moment))
        found = jax.scipy.linalg.solve(regular, target, assume_a="pos")
        return jnp.where(eps > 0, found, 0.0).astype(jnp.float32)


def _solve_on_host(ridge: float, moment: Array, cross: Array) -> Array:
    """For TPUs, whose compiler takes more than a minute for each factorisation in emulated float64."""

    def solve(moment: Any, cross: Any) -> np.ndarray:
        moment, target = np.asarray(moment, np.float64), np.asarray(cross, np.float64)
        eps = ridge * np.trace(moment) / len(moment)
        if eps <= 0:
            return np.zeros(target.shape, np.float32)
        return np.linalg.solve(moment + eps * np.eye(len(moment)), target).astype(np.float32)

    return jax.pure_callback(solve, jax.ShapeDtypeStruct(cross.shape, jnp.float32), moment, cross)


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
        kind: What it reports: sums of x^T x and x^T delta; sums of ||x D - delta||^2 and ||delta||^2 for the D of
            merged kernels; or the D of a sequential pass, whose batch is [routed rows; merged rows].
        ridge: Of ``solve_ridge``, in a sequential pass.
    """

    inner: Adapter
    kind: Kind = "moments"
    ridge: float = RIDGE

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
        """The method's delta (in merged rows x D), with the sums of this call in its gradient."""
        extra = _extra(leaves)
        delta: Any = self.inner.delta(_own(leaves), self._factored(leaves, x), base_output, kernel, gates, inputs)
        chain = None
        if inputs.chain is not None:
            delta, chain = delta
        weight = _token_weight(inputs, x)
        if self.kind == "sequential":
            half = x.shape[0] // 2
            statistics = self._solve(jax.lax.stop_gradient((x[half:], delta[:half])), weight[half:])
            merged = x[half:] @ statistics["change"].astype(x.dtype)
            delta = jnp.concatenate([delta[:half], merged.astype(delta.dtype)])
        else:
            seen = jax.lax.stop_gradient((x, delta))
            if self.kind == "errors":
                merged = dataclasses.replace(kernel, value=extra[EXTRA + "merged"])
                statistics = _errors(*seen, weight, merged.dense() - kernel.dense())
            else:
                statistics = _moments(*seen, weight)
        statistics = {name: shard_inputs(value) for name, value in statistics.items()}
        delta = emit(delta, {name: extra[EXTRA + name] for name in statistics}, statistics)
        return delta if chain is None else (delta, chain)

    def _solve(self, seen: tuple[Array, Array], weight: Array) -> dict[str, Array]:
        """The change that the tokens ask for, their second moment, their number and 1 for this call."""
        sums = _moments(*seen, weight)
        tokens = jnp.maximum(sums["count"][0], 1.0)
        moment = sums["xx"] / tokens
        change = solve_ridge(moment, sums["xd"] / tokens, self.ridge)
        return {"change": change, "moment": moment, "count": sums["count"], "calls": jnp.ones((1,))}

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


def _moments(x: Array, target: Array, weight: Array) -> dict[str, Array]:
    """Sums over tokens of x^T x: (in, in), x^T delta: (in, out) and 1: (1,), float32."""
    weighted = (x.astype(jnp.float32) * weight).reshape(-1, x.shape[-1])
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    target = target.astype(jnp.float32).reshape(-1, target.shape[-1])
    product = lambda left, right: jnp.matmul(left.T, right, precision="highest")  # noqa: E731
    return {"xx": product(weighted, x), "xd": product(weighted, target), "count": weight.sum()[None]}


def _errors(x: Array, target: Array, weight: Array, change: Array) -> dict[str, Array]:
    """Sums over tokens of ||x D - delta||^2 and ||delta||^2, (1,) float32 each."""
    target = target.astype(jnp.float32)
    miss = jnp.matmul(x.astype(jnp.float32), change, precision="highest") - target
    return {
        "error": (jnp.square(miss) * weight).sum()[None],
        "norm": (jnp.square(target) * weight).sum()[None],
    }


def _probe_shapes(adapted: AdaptedSite, kind: Kind) -> dict[str, tuple[int, ...]]:
    square = (adapted.site.in_features, adapted.site.in_features)
    wide = (adapted.site.in_features, adapted.site.out_features)
    shapes: dict[Kind, dict[str, tuple[int, ...]]] = {
        "moments": {"xx": square, "xd": wide, "count": (1,)},
        "errors": {"error": (1,), "norm": (1,)},
        "sequential": {"change": wide, "moment": square, "count": (1,), "calls": (1,)},
    }
    return {name: (*adapted.stack_sizes, *shape) for name, shape in shapes[kind].items()}


def capturing(plan: AdapterPlan, paths: Sequence[str], kind: Kind = "moments", ridge: float = RIDGE) -> AdapterPlan:
    """The plan with the methods at ``paths`` wrapped in ``Capture``."""
    sites = []
    for adapted in plan.sites:
        if adapted.site.path in paths:
            adapted = dataclasses.replace(adapted, adapter=Capture(inner=adapted.adapter, kind=kind, ridge=ridge))
        sites.append(dataclasses.replace(adapted, group=()))
    return dataclasses.replace(plan, sites=tuple(sites))


@functools.partial(jax.jit, static_argnames=("model", "watched", "call"))
@full_precision
def _add_batch(
    model: nn.Module,
    watched: AdapterPlan,
    call: ModelCall,
    params: Any,
    leaves: Leaves,
    merged: Mapping[str, Array],
    batch: Batch,
    total: Any,
) -> Any:
    """``total`` and the sums of one more batch; compiled once for each model, plan and shape."""

    def run(probes: Any) -> Any:
        own: dict[str, Any] = dict(leaves.params)
        for path, probe in probes.items():
            given = {"merged": merged[path]} if path in merged else {}
            own[path] = {**own[path], **{EXTRA + name: value for name, value in {**given, **probe}.items()}}
        return forward(model, watched, params, leaves._replace(params=own), batch, call)

    zeros = jax.tree.map(jnp.zeros_like, total)
    return jax.tree.map(lambda *sums: shard_inputs(jnp.add(*sums)), total, through_probes(run, zeros))


def collect(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    paths: Sequence[str],
    batches: Iterable[Batch],
    call: ModelCall,
    merged: Mapping[str, Array] | None = None,
) -> dict[str, dict[str, Array]]:
    """Sums over the tokens of all batches at the sites ``paths``.

    Args:
        model: The base module.
        params: Its frozen parameters.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        paths: Sites of the plan.
        batches: Of one shape; every entry has the batch axis first.
        call: Batch -> (args, kwargs, adapter inputs).
        merged: {path: merged kernels as the model stores them, layer axes leading}, to be judged.

    Returns:
        {path: {sum: (layers..., ...) float32}}: "xx", "xd" and "count", or with ``merged`` "error" and "norm".
    """
    kind: Kind = "moments" if merged is None else "errors"
    watched = capturing(plan, paths, kind)
    total: Any = {path: _zeros(plan[path], kind) for path in paths}
    for batch in batches:
        arrays = {name: jnp.asarray(value) for name, value in batch.items()}
        total = _add_batch(model, watched, call, params, leaves, merged or {}, arrays, total)
    return total


def solve_in_order(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    paths: Sequence[str],
    batches: Sequence[Batch],
    call: ModelCall,
    ridge: float = RIDGE,
) -> dict[str, dict[str, Array]]:
    """The change of each site in the order in which a pass reaches them, with those before it merged.

    Returns:
        {path: {"change": (layers..., in, out), "moment": (layers..., in, in) of the inputs in the merged model,
        "count": (layers..., 1) tokens, "calls": (layers..., 1) of the site in a pass}}, float32.
    """
    rows = {name: jnp.concatenate([jnp.asarray(batch[name]) for batch in (*batches, *batches)]) for name in batches[0]}
    watched = capturing(plan, paths, "sequential", ridge)
    zeros = {path: _zeros(plan[path], "sequential") for path in paths}
    return _add_batch(model, watched, call, params, leaves, {}, rows, zeros)


def _zeros(adapted: AdaptedSite, kind: Kind) -> dict[str, Array]:
    return {name: shard_inputs(jnp.zeros(shape)) for name, shape in _probe_shapes(adapted, kind).items()}


def shard_inputs(value: Array) -> Array:
    """A kernel's worth of numbers, (..., in, any), dealt by its inputs over all devices of the mesh in use.

    Of every site at once no device could hold them. Without a mesh whose axes are left to the compiler, or where they
    do not divide, they stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left_to_compiler = not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)
    if not left_to_compiler or value.ndim < 2 or value.shape[-1] == 1 or value.shape[-2] % mesh.size:
        return value
    split = PartitionSpec(*(None,) * (value.ndim - 2), mesh.axis_names)
    return jax.lax.with_sharding_constraint(value, split)
