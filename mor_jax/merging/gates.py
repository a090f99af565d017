"""Constant gates from calibration data: the mean gate of every router, over all tokens or over one task's."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.precision import full_precision
from mor_jax.injection import AdapterPlan, init_probes
from mor_jax.merging.calibration import Batch, ModelCall, forward, language_model_call, through_probes
from mor_jax.merging.chain import earlier_shares
from mor_jax.processes import gathered


@functools.partial(jax.jit, static_argnames=("model", "plan", "call"))
@full_precision
def _add_batch(
    model: nn.Module,
    plan: AdapterPlan,
    call: ModelCall,
    params: Any,
    leaves: Leaves,
    batch: Batch,
    probes: Any,
    total: Any,
) -> Any:
    found = through_probes(lambda p: forward(model, plan, params, leaves, batch, call, p), probes)
    return jax.tree.map(jnp.add, total, found)


def mean_gates(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    batches: Iterable[Batch],
    *,
    call: ModelCall = language_model_call,
    task: int | None = None,
) -> dict[str, Array]:
    """The average gate of each router over real tokens: {gate path: (layers..., N) float32}; ``earlier_shares`` too.

    Args:
        model: The base module.
        params: Its frozen parameters.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        batches: Calibration batches.
        call: Batch -> (args, kwargs, adapter inputs); for ``task`` its inputs carry ``task_ids``, ``num_tasks``.
        task: Only tokens of this task count.

    Raises:
        ValueError: if no calibration token (of the task) was seen.
    """
    batches = list(batches)
    shares = earlier_shares(model, params, leaves, plan, batches, call=call) if plan.chained else {}
    if shares and not any(s.adapter.num_gates for s in plan.sites):
        return shares
    total, probes = None, None
    for batch in batches:
        arrays = {name: jnp.asarray(value) for name, value in batch.items()}
        if total is None:
            inputs = call(arrays)[2]
            if task is not None and (inputs.task_ids is None or not 0 <= task < inputs.num_tasks):
                raise ValueError(f"task {task} is not among the {inputs.num_tasks} tasks of the calibration batches")
            probes = init_probes(plan, inputs.num_tasks if inputs.task_ids is not None else 0)
            total = probes
        total = _add_batch(model, plan, call, params, leaves, arrays, probes, total)
    if total is None:
        raise ValueError("mean gates need at least one calibration batch")
    return _averages(total, task) | shares


def _averages(total: Any, task: int | None) -> dict[str, Array]:
    """{gate path: mean gate} of the routers' sums, over the tokens of one task or over all (None)."""
    load, count = ("load", "count") if task is None else ("task_load", "task_count")
    gates = {}
    for path, sums in total.items():
        if load not in sums:
            continue
        tokens, weight = (np.asarray(gathered(sums[name])) for name in (count, load))
        if task is not None:
            tokens, weight = tokens[..., task, None], weight[..., task, :]
        if not (tokens > 0).all():
            raise ValueError("no calibration token" + ("" if task is None else f" of task {task}") + f" reached {path}")
        gates[path] = jnp.asarray(weight / tokens, jnp.float32)
    return gates
