"""The merge that is trained: a low-rank adapter learns to imitate the routed one, and merges exactly.

    start     the least-squares change of each routed site as factors a, b of rank k (`merging.refactor`)
    loss      KL(routed || merged) of the next-token distributions, over the tokens of the calibration batches
    steps     those of training: `make_step` on the factors alone; base, other adapters and teacher are frozen

Least squares makes each site right on its own; the KL weighs what the sites do together by what it does to the output.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax import Array
from jax.sharding import Mesh

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.adapters.precision import full_precision
from mor_jax.data.packing import permutation
from mor_jax.injection import Adapted, AdapterPlan
from mor_jax.merging import (
    ModelCall,
    compare_logits,
    language_model_call,
    least_squares,
    measure_fidelity,
    merge,
    refactor,
    routed_logits,
)
from mor_jax.merging.calibration import RIDGE, Batch
from mor_jax.merging.exact import sharding_of
from mor_jax.merging.fidelity import counted_rows
from mor_jax.optim.rules import Rules
from mor_jax.training.mesh import replicated
from mor_jax.training.step import Loss, NonFiniteError, StateShardings, TrainState, make_step, put_leaves

STEPS = 200
LEARNING_RATE = 3e-3
TARGET = "target_logits"  # the routed model's, beside a batch's own arrays


def distillation_loss(adapted: Adapted, call: ModelCall = language_model_call) -> Loss:
    """KL(target || adapted) of the next-token distributions, summed over tokens.

    Args:
      adapted: The model that learns.
      call: Batch -> (args, kwargs, adapter inputs); the model returns logits.

    Returns:
      (variables, batch, adapter_inputs) -> (KL sum, token count), float32 scalars; the batch has `target_logits`
      (..., V) and `loss_mask` (...), 1 where a token counts. Inputs are those of `call`, without dropout.
    """

    def loss(variables: Any, batch: Any, inputs: AdapterInputs) -> tuple[Array, Array]:
        args, kwargs, own = call(batch)
        logits: Any = adapted.apply(variables, *args, adapter_inputs=own, **kwargs)
        sums = compare_logits(batch[TARGET], logits, batch["loss_mask"] > 0)
        return sums["kl"], sums["tokens"].astype(jnp.float32)

    return loss


@full_precision
def distill(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    batches: Sequence[Batch],
    *,
    rank: int,
    call: ModelCall = language_model_call,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    ridge: float = RIDGE,
) -> tuple[AdapterPlan, Leaves]:
    """Ordinary LoRAs in place of the routed adapters, trained to give the routed model's next-token distributions.

    What comes back is never worse than the start on the calibration batches: where the start is already right, the
    steps are noise, and it is kept.

    Args:
      model: The base module.
      params: Its frozen parameters; not changed.
      leaves: The routed adapters; sites that are not routed and modules trained whole stay as they are.
      plan: From `resolve_sites`.
      batches: Calibration batches of one shape; every entry has the batch axis first.
      rank: Columns of every a.
      call: Batch -> (args, kwargs, adapter inputs); the model returns logits.
      steps: Optimiser steps, one batch each; 0 gives the start.
      learning_rate: Of Adam at the first step; a cosine takes it to 0.
      seed: Of the order of the batches.
      ridge: Of the least squares at the start.

    Returns:
      The plan with `LoRA(rank, alpha=rank)` at the routed sites, and its leaves; `merge` folds them in exactly.

    Raises:
      ValueError: No batches, or a rank that a site does not have.
      NonFiniteError: Loss or gradient of a step was not finite.
    """
    if not batches:
        raise ValueError("distillation needs at least one calibration batch")
    found = least_squares(model, params, leaves, plan, batches, call=call, sequential=False, ridge=ridge)
    student_plan, start = refactor(found, leaves, plan, rank)
    if steps == 0:
        return student_plan, start
    taught = _taught(model, params, leaves, plan, batches, call, steps, seed)
    optimizer = _optimizer(frozenset(found.changes), steps, learning_rate)
    student, start = Adapted(base=model, plan=student_plan), _balanced(start, found.changes)
    trained = _train(student, params, start, optimizer, taught, call, seed)
    report = functools.partial(measure_fidelity, model, params, leaves, plan, call=call, sites=False)
    kl = lambda own: report(merge(params, own, student_plan), batches).kl  # noqa: E731
    return student_plan, min(start, trained, key=kl)


def _train(
    adapted: Adapted,
    params: Any,
    leaves: Leaves,
    optimizer: optax.GradientTransformation,
    taught: Iterator[dict[str, Array]],
    call: ModelCall,
    seed: int,
) -> Leaves:
    """The leaves after a step on each batch; raises NonFiniteError."""
    leaves, mesh = _on_base_mesh(leaves, adapted, params)
    adapters, saved = jax.tree.map(jnp.array, (leaves.params, leaves.state))  # copies, because a step donates them
    key = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    state = TrainState(jnp.zeros((), jnp.int32), adapters, saved, optimizer.init(adapters), {}, key)
    shardings = None if mesh is None else _current_shardings(state, params, leaves.constants, mesh)
    state = state if shardings is None else jax.device_put(state, shardings.state)
    own: dict[str, Any] = {"constants": leaves.constants, "adapters": adapters, "shardings": shardings}
    # no rules, since those of other methods would change what stays as it is
    step = make_step(adapted, optimizer, loss=distillation_loss(adapted, call), rules=Rules(), **own)
    for number, batch in enumerate(taught, 1):
        state, metrics = step(state, params, batch)
        bad = int(metrics["bad_leaf"])
        if bad >= 0:
            raise NonFiniteError(number, step.names[bad])
    return Leaves(state.adapters, state.adapter_state, leaves.constants)


def _on_base_mesh(leaves: Leaves, adapted: Adapted, params: Any) -> tuple[Leaves, Mesh | None]:
    """The leaves where training has them, and the base's mesh; as they are, and None, without a mesh."""
    base = meta.unbox(params)
    places = [sharding_of(leaf) for leaf in jax.tree.leaves(base)]
    if adapted.plan is None or None in places:
        return leaves, None
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, base)
    return put_leaves(leaves, adapted.plan, specs, places[0].mesh), places[0].mesh


def _current_shardings(state: TrainState, params: Any, constants: Any, mesh: Mesh) -> StateShardings:
    """Everything stays where it is, so that no step compiles anew; batches may be anywhere."""
    where = lambda tree: jax.tree.map(lambda leaf: sharding_of(leaf) or replicated(mesh), tree)  # noqa: E731
    return StateShardings(where(state), where(params), where(constants), batch=None, metrics=replicated(mesh))


def _balanced(leaves: Leaves, paths: Container[str]) -> Leaves:
    """The same products a b, at `paths` with each column of a as long as its row of b: Adam moves all entries alike."""

    def balance(own: Any) -> dict[str, Array]:
        left = jnp.linalg.norm(own["a"], axis=-2, keepdims=True)
        right = jnp.swapaxes(jnp.linalg.norm(own["b"], axis=-1, keepdims=True), -1, -2)
        scale = jnp.where((left > 0) & (right > 0), jnp.sqrt(right / jnp.where(left > 0, left, 1.0)), 1.0)
        return {"a": own["a"] * scale, "b": own["b"] / jnp.swapaxes(scale, -1, -2)}

    return leaves._replace(params={path: balance(own) if path in paths else own for path, own in leaves.params.items()})


def _optimizer(trained: frozenset[str], steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam on the leaves of the sites `trained`, nothing on all others."""
    adam = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))
    )
    label = lambda params: {path: "trained" if path in trained else "frozen" for path in params}  # noqa: E731
    return optax.partition({"trained": adam, "frozen": optax.set_to_zero()}, label)


def _taught(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    batches: Sequence[Batch],
    call: ModelCall,
    steps: int,
    seed: int,
) -> Iterator[dict[str, Array]]:
    """`steps` batches with the routed model's logits, in epochs that the seed shuffles."""
    for number in range(steps):
        epoch, place = divmod(number, len(batches))
        chosen = batches[permutation(len(batches), seed, epoch)[place]]
        batch = {name: jnp.asarray(value) for name, value in chosen.items()}
        target = routed_logits(model, plan, call, params, leaves, batch)
        yield batch | {TARGET: target, "loss_mask": counted_rows(batch, target).astype(jnp.int32)}
