"""Gates over experts: softmax and top-k in float32, the balance loss and the sums that describe a router."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs


def softmax_gates(logits: Array, top_k: int = 0) -> Array:
    """Softmax over the last axis in float32; with ``top_k`` all but the k largest are 0 and the rest renormalised.

    Args:
        logits: (..., N).
        top_k: 0 keeps all experts.
    """
    logits = logits.astype(jnp.float32)
    if top_k:
        _, chosen = jax.lax.top_k(logits, top_k)
        keep = jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool).any(-2)
        logits = jnp.where(keep, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def switch_balance(gates: Array, mask: Array | None) -> Array:
    """N sum_i f_i p_i (Switch Transformer, arXiv 2101.03961, eq. 4): 1 for a uniform router.

    f_i is the share of tokens whose largest gate is i, p_i the mean gate.

    Args:
        gates: (..., N) float32.
        mask: (...,) true where a token counts, or None.
    """
    count = gates.shape[-1]
    weight = jnp.ones(gates.shape[:-1]) if mask is None else jnp.broadcast_to(mask, gates.shape[:-1])
    weight = weight.astype(jnp.float32)[..., None]
    axes = tuple(range(gates.ndim - 1))
    total = jnp.maximum(weight.sum(), 1.0)
    chosen = jax.nn.one_hot(gates.argmax(-1), count, dtype=jnp.float32)
    share = jax.lax.stop_gradient((chosen * weight).sum(axes) / total)
    mean = (gates * weight).sum(axes) / total
    return count * jnp.sum(share * mean)


def gate_statistics(gates: Array, inputs: AdapterInputs) -> dict[str, Array]:
    """Sums over real tokens: load (N,), entropy (1,), count (1,) and, per task, task_load (T, N), task_count (T,)."""
    gates = jax.lax.stop_gradient(gates)
    mask = None if inputs.segment_ids is None else inputs.segment_ids > 0
    weight = jnp.ones(gates.shape[:-1]) if mask is None else jnp.broadcast_to(mask, gates.shape[:-1])
    weight = weight.astype(jnp.float32)
    axes = tuple(range(gates.ndim - 1))
    entropy = -jnp.sum(jnp.where(gates > 0, gates * jnp.log(jnp.where(gates > 0, gates, 1.0)), 0.0), -1)
    sums = {
        "load": (gates * weight[..., None]).sum(axes),
        "entropy": (entropy * weight).sum()[None],
        "count": weight.sum()[None],
    }
    if inputs.num_tasks and inputs.task_ids is not None:
        tasks = jax.nn.one_hot(jnp.broadcast_to(inputs.task_ids, weight.shape), inputs.num_tasks, dtype=jnp.float32)
        tasks = (tasks * weight[..., None]).reshape(-1, inputs.num_tasks)
        sums["task_load"] = tasks.T @ gates.reshape(-1, gates.shape[-1])
        sums["task_count"] = tasks.sum(0)
    return sums
