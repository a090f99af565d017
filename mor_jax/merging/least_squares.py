"""The constant kernel change that best imitates an input-routed adapter, in the least-squares sense.

    D = argmin E||x D - delta(x)||^2 = (E[x^T x] + eps I)^-1 E[x^T delta(x)],   eps = 1e-4 tr(E[x^T x]) / in

from sums streamed over calibration batches. Sequentially, block i is calibrated on the inputs that it gets when the
blocks before it are merged, with the routed model's deltas as targets, so that later blocks make up for earlier errors;
that costs one pass over the batches a block. The systems are solved in float64 on the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.injection import AdaptedSite, AdapterPlan, link_leaves
from mor_jax.merging.calibration import Batch, ModelCall, controls_for, language_model_call, make_collector
from mor_jax.merging.exact import add_change, merge_site, merge_trained_modules, update_site
from mor_jax.merging.factors import with_loras

RIDGE = 1e-4
_BLOCK = re.compile(r"(?:.*?/)?(?:layers?|blocks?|h)(?:[_/]?\d+)?(?=/|$)")


class Calibration(NamedTuple):
    """What least squares found at each routed site, layer axes leading.

    Attributes:
        changes: {path: (layers..., in, out) float32}, the D above.
        second_moments: {path: (layers..., in, in) float32}, the E[x^T x] above.
    """

    changes: dict[str, Array]
    second_moments: dict[str, Array]


def solve_ridge(second_moment: np.ndarray, cross: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """(C + ridge tr(C) / in I)^-1 R in float64; zeros where no input was ever seen.

    Args:
        second_moment: C = E[x^T x]: (in, in).
        cross: R = E[x^T delta]: (in, out).
        ridge: How much of the mean eigenvalue is added to the diagonal.
    """
    moment, cross = np.asarray(second_moment, np.float64), np.asarray(cross, np.float64)
    eps = ridge * np.trace(moment) / len(moment)
    if eps <= 0:
        return np.zeros_like(cross)
    return np.linalg.solve(moment + eps * np.eye(len(moment)), cross)


def routed_paths(plan: AdapterPlan) -> tuple[str, ...]:
    """Paths of the sites whose gate depends on the input."""
    return tuple(s.site.path for s in plan.sites if not s.adapter.merges_exactly)


def calibration_blocks(plan: AdapterPlan) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The routed sites in the order in which a sequential merge takes them, block by block.

    Returns:
        For each block its (path, layer index) pairs; the index is () outside scans. A block is one layer of a scanned
        stack, one module named like ``layers_3``, or else a site on its own.
    """
    blocks: dict[Any, list[tuple[str, tuple[int, ...]]]] = {}
    for path in routed_paths(plan):
        adapted = plan[path]
        found = _BLOCK.match(path)
        stem = found.group() if found else (path.split("/")[0] if adapted.stack_sizes else path)
        for index in np.ndindex(adapted.stack_sizes):
            blocks.setdefault((stem, adapted.stack_sizes, index), []).append((path, index))
    return list(blocks.values())


def _solve(sums: Mapping[str, Any], index: tuple[int, ...], path: str, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(D, C) of one layer of one site."""
    tokens = float(np.asarray(sums["count"][index])[0])
    if tokens <= 0:
        raise ValueError(f"no calibration token reached {path}")
    moment = np.asarray(sums["xx"][index], np.float64) / tokens
    return solve_ridge(moment, np.asarray(sums["xd"][index], np.float64) / tokens, ridge), moment


def _zeros(adapted: AdaptedSite, *shape: int) -> np.ndarray:
    """(layers..., *shape) float32."""
    return np.zeros((*adapted.stack_sizes, *shape), np.float32)


def least_squares(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    batches: Sequence[Batch],
    *,
    call: ModelCall = language_model_call,
    sequential: bool = True,
    ridge: float = RIDGE,
) -> Calibration:
    """The least-squares change of every routed site.

    Args:
        model: The base module.
        params: Its frozen parameters.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        batches: Calibration batches; every entry has the batch axis first. All sites' sums are held at once, which is
            (in^2 + in out) float32 numbers a site and layer, and sequentially another in out.
        call: Batch -> (args, kwargs, adapter inputs).
        sequential: Calibrate each block with the blocks before it merged: one pass over ``batches`` a block, with
            doubled batches.
        ridge: eps / mean eigenvalue.

    Raises:
        ValueError: if there is no calibration token.
    """
    paths, batches = routed_paths(plan), list(batches)
    changes = {path: _zeros(plan[path], plan[path].site.in_features, plan[path].site.out_features) for path in paths}
    moments = {path: _zeros(plan[path], plan[path].site.in_features, plan[path].site.in_features) for path in paths}
    merged = {path: _zeros(plan[path], 1) for path in paths}
    collect = make_collector(model, plan, paths, call, paired=sequential)
    steps = calibration_blocks(plan)
    if not sequential:
        steps = [[pair for step in steps for pair in step]]
    for block in steps:
        wanted = {path: np.zeros_like(merged[path]) for path in paths}
        for path, index in block:
            wanted[path][index] = 1
        controls = {
            path: controls_for(plan[path], *(jnp.asarray(v) for v in (wanted[path], merged[path], changes[path])))
            for path in paths
        }
        sums = collect(params, leaves, controls, batches)
        for path, index in block:
            changes[path][index], moments[path][index] = _solve(sums[path], index, path, ridge)
            merged[path][index] = 1
    return Calibration({p: jnp.asarray(v) for p, v in changes.items()}, {p: jnp.asarray(v) for p, v in moments.items()})


def merge_changes(
    params: Mapping[str, Any], leaves: Leaves, plan: AdapterPlan, changes: Mapping[str, Array]
) -> dict[str, Any]:
    """Base parameters with W + D at the sites of ``changes`` and the exact merge everywhere else.

    Args:
        params: The frozen base.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        changes: {path: (layers..., in, out)}; sums are formed in float32 and rounded once.
    """
    merged, leaves = dict(params), link_leaves(plan, leaves)
    for adapted in plan.sites:
        change = changes.get(adapted.site.path)
        if change is None:
            merged = merge_site(merged, leaves, adapted)
        else:
            merged = update_site(merged, adapted, add_change, change)
    return merge_trained_modules(merged, leaves, plan)


def factorize(change: np.ndarray, second_moment: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """a: (in, rank), b: (rank, out) with the least E||x a b - x D||^2 of any rank-``rank`` product, float64.

    With C = E[x^T x] + eps I = L L^T, the best approximation of L^T D is its truncated singular value decomposition
    (Eckart and Young): b are its right vectors, a = L^-T (left vectors times values).

    Args:
        change: D: (in, out).
        second_moment: E[x^T x]: (in, in); all zeros means the plain metric.
        rank: At most min(in, out).
    """
    change, moment = np.asarray(change, np.float64), np.asarray(second_moment, np.float64)
    if not 1 <= rank <= min(change.shape):
        raise ValueError(
            f"rank must be between 1 and {min(change.shape)} for a change of shape {change.shape}, got {rank}"
        )
    scale = np.trace(moment) / len(moment)
    factor = np.linalg.cholesky(moment + RIDGE * scale * np.eye(len(moment))) if scale > 0 else np.eye(len(moment))
    left, values, right = np.linalg.svd(factor.T @ change, full_matrices=False)
    weighted = left[:, :rank] * values[:rank]
    return np.linalg.solve(factor.T, weighted), right[:rank]


def refactor(calibration: Calibration, leaves: Leaves, plan: AdapterPlan, rank: int) -> tuple[AdapterPlan, Leaves]:
    """The least-squares changes as ordinary LoRAs of one rank, ready for an adapter file or a PEFT export.

    Args:
        calibration: From ``least_squares``.
        leaves: The routed adapters; sites that are not routed keep theirs.
        plan: Their plan.
        rank: Columns of every a.

    Returns:
        A plan whose routed sites have ``LoRA(rank=rank, alpha=rank)``, and its leaves.
    """
    factors = {}
    for path, changes in calibration.changes.items():
        stack, moments = plan[path].stack_sizes, calibration.second_moments[path]
        pairs = [factorize(np.asarray(changes[i]), np.asarray(moments[i]), rank) for i in np.ndindex(stack)]
        a, b = (jnp.asarray(np.stack(one), jnp.float32) for one in zip(*pairs, strict=True))
        factors[path] = a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:])
    return with_loras(plan, leaves, factors)
