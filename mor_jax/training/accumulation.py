"""Sums over the micro-batches of a step: loss, tokens, gradients of the adapters, statistics.

On a mesh the gradient of a micro-batch is a sum over devices. Along one axis that sum waits until all micro-batches are
done: each part of the rows adds up its own gradients (a leading axis of the accumulators, split over that mesh axis),
and one reduction a step brings them together.

    data        where there is one: every device holds the whole gradient anyway, so its parts cost no memory
    fsdp        else, up to `LARGEST_SUM`: the factors are split, and so would be their gradient, while partial sums
                are whole on each device, beside the gradient of one micro-batch. The base stays split and is gathered
                layer by layer as ever: the compiled program has the same gathers, of the same bytes
    sequence    never: what a part of a row adds to a gradient depends on the keys and values of the others, so that the
                loss of a part is nothing by itself

With parts over `data` and `fsdp` at once the compiler would gather the looked-up embeddings of all `data` devices in
every micro-batch; that axis is the one that crosses slices. There, and beyond `LARGEST_SUM`, each micro-batch is
reduced along `fsdp` as it comes: a mesh that gathers the base for every micro-batch sends far more for that.

A loss that is more than a sum over rows can't be taken apart: balance losses are products of means over a micro-batch,
and one draw of dropout covers it. Methods with either are reduced after each micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.injection import AdapterPlan, init_probes, prepare_leaves
from mor_jax.injection.leaves import count_bytes
from mor_jax.models.logical_axes import TABLE
from mor_jax.training.sharding import hold_split

Batch = Mapping[str, Array]
LARGEST_SUM = 2**29  # bytes of a gradient that each device of `fsdp` may hold whole; MoR on all maps of an 8B is 4e8


def partial_sum_axis(plan: AdapterPlan, accumulate: int, mesh: Mesh | None, trained: Any) -> str | None:
    """The mesh axis whose devices keep sums of their own over the micro-batches; None where all share one.

    Args:
      plan: where the adapters sit.
      accumulate: micro-batches of a step.
      mesh: of the run, or None.
      trained: what is differentiated, arrays or shapes.
    """
    if mesh is None or accumulate == 1 or any(site.adapter.dropout or _balanced(site.adapter) for site in plan.sites):
        return None
    if mesh.shape.get("data", 1) > 1:
        return "data"
    return "fsdp" if mesh.shape.get("fsdp", 1) > 1 and count_bytes(trained) <= LARGEST_SUM else None


def _balanced(adapter: Any) -> bool:
    gates = jax.ShapeDtypeStruct((1, adapter.num_gates), jnp.float32)
    return bool(adapter.num_gates) and jax.eval_shape(lambda gates: adapter.balance(gates, None), gates) is not None


def sum_micro_batches(
    plan: AdapterPlan,
    accumulate: int,
    mesh: Mesh | None,
    loss: Callable[..., tuple[Array, Array]],
    leaves: Leaves,
    params: Any,
    batch: Batch,
    base: AdapterInputs,
    key: Array,
) -> tuple[Array, Array, Any, Any]:
    """(loss sum, token count, gradient of the loss sum for the adapters, statistics) over all micro-batches.

    Args:
      plan: where the adapters sit.
      accumulate: micro-batches; row i goes to micro-batch i mod `accumulate`.
      mesh: of the run, or None.
      loss: (variables, batch, adapter_inputs) -> (loss sum, token count).
      leaves: of the adapters; the gradient is that of their params.
      params: the frozen base.
      batch: {name: (B, ...)}.
      base: what adapters know beside the batch.
      key: of the step.
    """
    own, pullback, micro_loss = _prepared(plan, mesh, loss, leaves, params, base)
    probes = init_probes(plan, base.num_tasks)
    gradients_of = jax.value_and_grad(micro_loss, argnums=(0, 1), has_aux=True)
    zero = jnp.zeros((), jnp.float32)
    sums = (zero, zero, jax.tree.map(jnp.zeros_like, own), probes)
    axis = partial_sum_axis(plan, accumulate, mesh, own)
    if mesh is not None and axis is not None:
        parts = mesh.shape[axis]
        gradients_of = _by_part(gradients_of, axis, parts)
        sums = jax.tree.map(lambda leaf: _split(jnp.zeros((parts, *leaf.shape), leaf.dtype), axis), sums)

    def micro_step(sums, inputs):
        number, rows = inputs
        (total, tokens), gradients = gradients_of(own, probes, rows, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, sums, (total, tokens, *gradients)), None

    if accumulate == 1:
        sums, _ = micro_step(sums, (jnp.zeros((), jnp.int32), dict(batch)))
    else:
        rows = {name: _split_rows(value, accumulate) for name, value in batch.items()}
        sums, _ = jax.lax.scan(micro_step, sums, (jnp.arange(accumulate), rows))
    if axis is not None:
        sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
    total, tokens, gradient, statistics = sums
    return total, tokens, pullback(gradient)[0], statistics


def _prepared(plan, mesh, loss, leaves, params, base):
    """(trained leaves as prepared for a step, the way back to the adapters, loss of them and a micro-batch)."""
    frozen = {id(leaf) for leaf in jax.tree.leaves((leaves.state, leaves.constants))}
    structure: list[Any] = []

    def prepare(adapters):
        stored = {id(leaf) for leaf in jax.tree.leaves(adapters)}
        prepared, treedef = jax.tree.flatten(prepare_leaves(plan, leaves._replace(params=adapters), params))
        trained = [id(leaf) not in frozen and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in prepared]
        structure[:] = [treedef, trained]
        own = [leaf for leaf, is_trained in zip(prepared, trained, strict=True) if is_trained]
        if mesh is not None:
            own = [leaf if id(leaf) in stored else hold_split(leaf, mesh) for leaf in own]
        return own, [leaf for leaf, is_trained in zip(prepared, trained, strict=True) if not is_trained]

    own, pullback, others = jax.vjp(prepare, leaves.params, has_aux=True)
    treedef, trained = structure

    def micro_loss(own, probes, batch, key):
        first, second = iter(own), iter(others)
        whole = treedef.unflatten([next(first if is_trained else second) for is_trained in trained])
        collections = {"adapters": whole.params, "adapter_state": whole.state, "adapter_constants": whole.constants}
        return loss({"params": params, **collections, "adapter_probes": probes}, batch, batch_inputs(base, batch, key))

    return own, pullback, micro_loss


def _by_part(gradients_of: Callable[..., Any], axis: str, parts: int) -> Callable[..., Any]:
    """`gradients_of` the rows of each part, its results with a leading axis of parts, split over a mesh axis."""
    mapped = jax.vmap(gradients_of, in_axes=(None, None, 0, None), spmd_axis_name=axis)

    def apart(own, probes, rows, key):
        rows = {name: value.reshape(parts, -1, *value.shape[1:]) for name, value in rows.items()}
        rules = dict(nn.get_logical_axis_rules())
        within = rules | {name: _without(axis, rules[name]) for name in rules if name not in TABLE}
        with nn.logical_axis_rules(tuple(within.items())):  # the parts' own axis is what is mapped over
            return mapped(own, probes, rows, key)

    return apart


def _without(axis: str, axes: Any) -> Any:
    kept = tuple(each for each in ((axes,) if isinstance(axes, str) else axes or ()) if each != axis)
    return kept or None


def _split(value: Array, axis: str) -> Array:
    free = (PartitionSpec.UNCONSTRAINED,) * (value.ndim - 1)
    return jax.lax.with_sharding_constraint(value, PartitionSpec(axis, *free))


def _split_rows(value: Array, accumulate: int) -> Array:
    """(B, ...) -> (A, B / A, ...): every device deals its own rows over the micro-batches."""
    return jnp.swapaxes(value.reshape(value.shape[0] // accumulate, accumulate, *value.shape[1:]), 0, 1)


def batch_inputs(base: AdapterInputs, batch: Batch, key: Array | None) -> AdapterInputs:
    """What adapters know of a micro-batch; balance losses weigh as many tokens as it has."""
    known = {name: batch.get(name) for name in ("segment_ids", "prompt_mask", "task_ids", "positions")}
    tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
    return dataclasses.replace(base, **known, key=key, auxiliary_scale=tokens)
