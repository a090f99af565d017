"""The constant kernel change that best imitates an input-routed adapter, in the least-squares sense.

    D = argmin E||x D - delta(x)||^2 = (E[x^T x] + eps I)^-1 E[x^T delta(x)],   eps = 1e-4 tr(E[x^T x]) / in

from sums streamed over calibration batches. Sequentially, each map is calibrated on the inputs that it gets when all
before it are merged, with the routed model's deltas as targets, so that later maps make up for earlier errors; one pass
over all batches at once does that. The systems are solved in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.precision import full_precision
from mor_jax.finite import NotFiniteError
from mor_jax.injection import AdaptedSite, AdapterPlan, link_leaves
from mor_jax.merging.calibration import (
    RIDGE,
    Batch,
    ModelCall,
    collect,
    language_model_call,
    shard_inputs,
    solve_in_order,
    solve_ridge,
)
from mor_jax.merging.exact import add_change, merge_site, merge_trained_modules, update_site
from mor_jax.merging.factors import with_loras
from mor_jax.processes import from_first, gathered, is_first


class Calibration(NamedTuple):
    """What least squares found at each routed site, layer axes leading.

    Attributes:
        changes: {path: (layers..., in, out) float32}, the D above.
        second_moments: {path: (layers..., in, in) float32}, the E[x^T x] above.
    """

    changes: dict[str, Array]
    second_moments: dict[str, Array]


def routed_paths(plan: AdapterPlan) -> tuple[str, ...]:
    """Paths of the sites whose gate depends on the input."""
    return tuple(s.site.path for s in plan.sites if not s.adapter.merges_exactly)


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
        batches: Calibration batches of one shape; every entry has the batch axis first. All sites' sums are held at
            once, which is (in^2 + in out) float32 numbers a site and layer.
        call: Batch -> (args, kwargs, adapter inputs).
        sequential: Calibrate each site with the sites before it merged. All batches then run as one, twice as long: it
            takes the memory of a forward pass over them.
        ridge: eps / mean eigenvalue.

    Raises:
        ValueError: There is no calibration token, or sequentially a site that the model calls more than once.
    """
    paths, batches = routed_paths(plan), list(batches)
    own = (model, params, leaves, plan, paths, batches, call)
    found = solve_in_order(*own, ridge) if sequential else collect(*own)
    for path, sums in found.items():
        if not bool((sums["count"] > 0).all()):
            raise ValueError(f"no calibration token reached {path}")
        if sequential and bool((sums["calls"] > 1).any()):
            raise ValueError(f"{path} is called more than once in a pass: calibrate it with sequential=False")
    if sequential:
        return Calibration(*({path: sums[name] for path, sums in found.items()} for name in ("change", "moment")))
    solved = {path: _solve(plan[path], sums, ridge) for path, sums in found.items()}
    return Calibration(*({path: pair[i] for path, pair in solved.items()} for i in (0, 1)))


def _solve(adapted: AdaptedSite, sums: Mapping[str, Array], ridge: float) -> tuple[Array, Array]:
    """(D, C) of a site, layer axes leading."""
    count = sums["count"][..., None]
    moment, cross = sums["xx"] / count, sums["xd"] / count
    layers = math.prod(adapted.stack_sizes)
    flat = moment.reshape(layers, *moment.shape[-2:]), cross.reshape(layers, *cross.shape[-2:])
    return _solve_layers(flat, ridge).reshape(cross.shape), moment


@functools.partial(jax.jit, static_argnums=1)
@full_precision
def _solve_layers(sums: tuple[Array, Array], ridge: float) -> Array:
    return jax.lax.map(lambda layer: shard_inputs(solve_ridge(layer[0], layer[1], ridge)), sums)


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

    Raises:
        ValueError: for a rank out of range.
        NotFiniteError: change or moment is not finite.
    """
    change, moment = np.asarray(change, np.float64), np.asarray(second_moment, np.float64)
    if not 1 <= rank <= min(change.shape):
        raise ValueError(
            f"rank must be between 1 and {min(change.shape)} for a change of shape {change.shape}, got {rank}"
        )
    if not (np.isfinite(change).all() and np.isfinite(moment).all()):
        raise NotFiniteError("least squares", "a site's change or its inputs are not finite; are base and adapter?")
    scale = np.trace(moment) / len(moment)
    factor = np.linalg.cholesky(moment + RIDGE * scale * np.eye(len(moment))) if scale > 0 else np.eye(len(moment))
    left, values, right = np.linalg.svd(factor.T @ change, full_matrices=False)
    weighted = left[:, :rank] * values[:rank]
    return np.linalg.solve(factor.T, weighted), right[:rank]


def _factorize_once(change: Array, second_moment: Array, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """``factorize`` in float32, by process 0 for all: other hosts' libraries may turn or flip the vectors."""
    failure, nothing = None, np.float32("nan")
    pair = np.full((change.shape[0], rank), nothing), np.full((rank, change.shape[1]), nothing)
    if is_first():
        try:
            found = factorize(np.asarray(change), np.asarray(second_moment), rank)
            pair = tuple(part.astype(np.float32) for part in found)
        except (ValueError, np.linalg.LinAlgError, FloatingPointError) as error:  # the others wait for what comes next
            failure = error
    pair = from_first(pair)
    if failure is not None:
        raise failure
    if np.isnan(pair[0]).all():
        raise FloatingPointError("process 0 could not factorise a change: its own log says why")
    return pair


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
        pairs = [_factorize_once(gathered(changes[i]), gathered(moments[i]), rank) for i in np.ndindex(stack)]
        a, b = (jnp.asarray(np.stack(one), jnp.float32) for one in zip(*pairs, strict=True))
        factors[path] = a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:])
    return with_loras(plan, leaves, factors)
