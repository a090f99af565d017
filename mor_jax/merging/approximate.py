"""One argument for every way to merge, and the default: whichever imitates the routed model best on held-out data."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from mor_jax.adapters import Adapter, Leaves
from mor_jax.finite import NotFiniteError
from mor_jax.injection import AdapterPlan
from mor_jax.injection.arguments import check_leaves, check_params
from mor_jax.merging.calibration import Batch, ModelCall, language_model_call
from mor_jax.merging.exact import merge, refuse_unfaithful
from mor_jax.merging.fidelity import FidelityReport, check_unseen, measure_fidelity
from mor_jax.merging.gates import mean_gates
from mor_jax.merging.least_squares import least_squares, merge_changes, routed_paths

MERGES = ("best", "mean", "least_squares", "sequential")
APPROXIMATIONS = "distill, least_squares, sequential, mean, task:NAME"
_LOGGER = logging.getLogger(__name__)


def _task_index(gates: str, tasks: Sequence[str]) -> int:
    name = gates.removeprefix("task:")
    if name not in tasks:
        raise ValueError(f"gates={gates!r}: no such task; tasks are {', '.join(tasks) or 'not named'}")
    return list(tasks).index(name)


def _known_merges(gates: str, others: Iterable[str]) -> tuple[str, ...]:
    """The names of all merges; raises ValueError when ``gates`` is none of them and no task."""
    names = (*MERGES, *others)
    if gates not in names and not gates.startswith("task:"):
        raise ValueError(f"gates must be one of {', '.join(names)} or task:NAME, got {gates!r}")
    return names


def _check_data(calibration: Sequence[Batch], heldout: Sequence[Batch]) -> None:
    if not calibration or not heldout:
        raise ValueError("an approximate merge needs calibration batches and held-out batches")
    check_unseen(calibration, heldout)


def _merge_one(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    gates: str,
    batches: Sequence[Batch],
    call: ModelCall,
    tasks: Sequence[str],
) -> dict[str, Any]:
    if gates in ("least_squares", "sequential"):
        found = least_squares(model, params, leaves, plan, batches, call=call, sequential=gates == "sequential")
        return merge_changes(params, leaves, plan, found.changes)
    task = _task_index(gates, tasks) if gates.startswith("task:") else None
    return merge(params, leaves, plan, mean_gates(model, params, leaves, plan, batches, call=call, task=task))


def merge_routed(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    *,
    calibration: Sequence[Batch],
    heldout: Sequence[Batch],
    gates: str = "best",
    tasks: Sequence[str] = (),
    call: ModelCall = language_model_call,
    evaluate: Callable[[Callable[[Batch], Array]], float] | None = None,
    others: Mapping[str, Callable[[], dict[str, Any]]] | None = None,
    rounding: Callable[[dict[str, Any]], dict[str, Any]] = lambda merged: merged,
) -> tuple[dict[str, Any], FidelityReport]:
    """Merged parameters and how faithful they are; exact where every site's method has an exact merge.

    Args:
        model: The base module.
        params: Its frozen parameters; not changed.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        calibration: Batches to take statistics from; not read when the merge is exact.
        heldout: Batches for the report; no row may be among ``calibration``. ``best`` is chosen on one half of their
            batches and reported on the other, where there are two or more.
        gates: "mean", "task:NAME", "least_squares", "sequential" (least squares site after site), a name of ``others``,
            or "best": the one of all these but "task:NAME" with the smallest KL.
        tasks: Names of the task ids; ``call`` must then pass ``num_tasks`` for "task:NAME".
        call: Batch -> (args, kwargs, adapter inputs); the model returns logits.
        evaluate: (batch -> logits) -> a task metric for the report.
        others: Further ways to merge, {name: a function that returns merged parameters}; called only where needed.
        rounding: What becomes of merged parameters when they are written; the rounded ones are measured and returned.

    Raises:
        ValueError: for an unknown ``gates`` or task, no data, or held-out rows among the calibration rows.
        NotMergeable: as for ``merge``.
        NotFiniteError: No merge has a finite KL.
    """
    check_params(params, plan)
    check_leaves(leaves)
    others = others or {}
    names = _known_merges(gates, others)
    refuse_unfaithful(params, plan)
    report = functools.partial(measure_fidelity, model, params, leaves, plan, call=call)
    if not routed_paths(plan):
        merged = rounding(merge(params, leaves, plan))
        return merged, report(merged, heldout, method="exact", evaluate=evaluate)
    _check_data(calibration, heldout)
    one = lambda name: rounding(  # noqa: E731
        others[name]() if name in others else _merge_one(model, params, leaves, plan, name, calibration, call, tasks)
    )
    if gates != "best":
        merged = one(gates)
        return merged, report(merged, heldout, method=gates, evaluate=evaluate)
    choosing, reporting = (heldout[::2], heldout[1::2]) if len(heldout) > 1 else (heldout, heldout)
    best, merged, divergences = _least_divergent(names[1:], one, lambda merged: report(merged, choosing, sites=False))
    return merged, dataclasses.replace(
        report(merged, reporting, method=best, evaluate=evaluate), candidates=divergences
    )


def _least_divergent(
    names: Sequence[str], merge_by: Callable[[str], dict[str, Any]], report: Callable[[dict[str, Any]], FidelityReport]
) -> tuple[str, dict[str, Any], dict[str, float]]:
    """(the name whose merge has the smallest KL, that merge, all KLs); no more than two merges are alive at a time.

    A merge that is not finite is left out with a warning; raises NotFiniteError where none is left.
    """
    divergences: dict[str, float] = {}
    best: Any = None
    for name in names:
        try:
            merged = merge_by(name)
            kl = report(merged).kl
        except FloatingPointError as error:
            kl, merged = math.nan, None
            _LOGGER.warning("%s: %s", name, error)
        if not math.isfinite(kl):
            _LOGGER.warning("%s is no candidate: its divergence from the routed model is not finite", name)
            continue
        divergences[name] = kl
        if kl == min(divergences.values()):
            best = (name, merged)
    if best is None:
        problem = "no merge has a finite divergence from the routed model: is the adapter finite?"
        raise NotFiniteError(f"merges {', '.join(names)}", problem)
    return *best, divergences


def merge_words(adapters: Sequence[Adapter]) -> str:
    """How a model with these adapters merges: "exact", the approximations, or what has to be set first."""
    found = {adapter.merge_condition for adapter in adapters} - {""}
    if found:
        return f"only with {', '.join(sorted(found))}"
    return "exact" if all(adapter.merges_exactly for adapter in adapters) else f"approximate: {APPROXIMATIONS}"
