"""Whether a merged model computes what the adapted one does on the user's own inputs, for models unknown to us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.adapters import AdapterInputs, Leaves, NotMergeable
from mor_jax.injection import Adapted, AdapterPlan, get_path
from mor_jax.merging.exact import merge

ROUNDINGS = 4  # units in the last place of the coarsest dtype that a merge may miss however little the adapters do


@dataclass(frozen=True)
class MergeCheck:
    """A merged forward pass against the adapted one, over all outputs that are floating-point arrays.

    Attributes:
        difference: Largest absolute difference of an output.
        relative_difference: ||merged - adapted|| / ||adapted - base||: the share of the adapter's effect that the merge
            misses; 0 where both norms are.
        effect: ||adapted - base|| / ||base||, how much the adapter does on these inputs at all.
        rounding: What rounding explains of ||merged - adapted|| / ||base||.
        missed: ||merged - adapted|| / ||base||.
    """

    difference: float
    relative_difference: float
    effect: float
    rounding: float
    missed: float

    def within(self, tolerance: float) -> bool:
        """Whether the merge misses no more than this share of the adapter's effect, or than rounding explains."""
        return self.missed <= max(tolerance * self.effect, self.rounding)


def check_merge(
    model: nn.Module,
    params: Mapping[str, Any],
    leaves: Leaves,
    plan: AdapterPlan,
    *args: Any,
    tolerance: float | None = 1e-2,
    merged: Mapping[str, Any] | None = None,
    collections: Mapping[str, Any] | None = None,
    adapter_inputs: AdapterInputs | None = None,
    **kwargs: Any,
) -> MergeCheck:
    """Runs the base, the adapted and the merged model on example inputs and compares what comes out.

    Args:
        model: The base module.
        params: Its frozen parameters.
        leaves: The adapters. At their start most do nothing, and there is nothing to compare: check trained ones.
        plan: From ``resolve_sites``.
        *args: Example inputs of the model.
        tolerance: Share of the adapter's effect that the merge may miss; None raises nothing.
        merged: Merged parameters; by default ``merge(params, leaves, plan)``.
        collections: The base's other variables (batch_stats).
        adapter_inputs: What the methods may know of the batch.
        **kwargs: More inputs of the model, and ``rngs`` or ``method``.

    Raises:
        NotMergeable: if the merge misses more, is not finite, or if ``merge`` refuses.
        ValueError: if the model returns no floating-point array.
    """
    merged = merge(params, leaves, plan) if merged is None else merged
    others = dict(collections or {})
    own = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": leaves.constants}
    adapted = Adapted(base=model, plan=plan).apply(
        {**others, "params": params, **own}, *args, adapter_inputs=adapter_inputs, **kwargs
    )
    base = model.apply({**others, "params": params}, *args, **kwargs)
    folded = model.apply({**others, "params": merged}, *args, **kwargs)
    found = _compare(_arrays(base), _arrays(adapted), _arrays(folded), _coarsest(plan, params, base))
    if tolerance is not None and not found.within(tolerance):
        raise NotMergeable(
            f"the merged model misses {found.relative_difference:.2%} of what the adapters do on these inputs (outputs "
            f"differ by up to {found.difference:.3g}), more than the tolerance of {tolerance:.2%}; keep the adapters "
            "beside the base"
        )
    return found


def _arrays(output: Any) -> list[np.ndarray]:
    """All floating-point arrays of an output, in float64."""
    leaves = [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]
    return [np.asarray(leaf, np.float64) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _coarsest(plan: AdapterPlan, params: Mapping[str, Any], output: Any) -> float:
    """The largest unit of rounding among the kernels that are merged and the outputs."""
    kernels = [get_path(params, s.kernel_path) for s in plan.sites]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((kernels, output)) if hasattr(leaf, "dtype")}
    return max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)), default=0.0)


def _compare(base: list[np.ndarray], adapted: list[np.ndarray], merged: list[np.ndarray], unit: float) -> MergeCheck:
    if not base:
        raise ValueError("the model returns no floating-point array, so there is nothing to compare")
    norm = lambda left, right: float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(left, right, strict=True))))  # noqa: E731
    size, effect, missed = norm(base, [np.zeros(())] * len(base)), norm(adapted, base), norm(merged, adapted)
    largest = max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(merged, adapted, strict=True))
    whole = size or 1.0
    share = missed / effect if effect else (0.0 if missed == 0 else float("inf"))
    return MergeCheck(largest, share, effect / whole, ROUNDINGS * unit, missed / whole)
