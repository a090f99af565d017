"""The pure training step, used alike by the training loop and the benchmarks.

    prepare_leaves ──vjp──┐   once a step, outside the micro-batches
    micro-batch 1..A ─────┤   accumulation.py: sums of the loss, of its gradients and of the router statistics
    divide once by the token count of the whole batch, pull the sums back through prepare, clip, update

Because the loss is a sum of token losses divided once, accumulation, padding and packing do not change it. The base is
an argument of the step: never in the state, never donated. A non-finite loss, gradient or update leaves every leaf of
the state as it was and is told in the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.linen.spmd import with_logical_constraint
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.injection import Adapted, AdapterPlan, adapter_specs, init_leaves
from mor_jax.models import HeadKernel
from mor_jax.models.logical_axes import RESIDUAL, split_ways
from mor_jax.optim import Rules, mean_penalty
from mor_jax.training.accumulation import sum_micro_batches
from mor_jax.training.backend import compiler_options
from mor_jax.training.losses import chunked_cross_entropy, cross_entropy
from mor_jax.training.mesh import batch_sharding, put, replicated
from mor_jax.training.sharding import on_mesh, shardings_of, spread

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Loss = Callable[[Mapping[str, Any], Batch, AdapterInputs], tuple[Array, Array]]  # -> (loss sum, token count), float32


_RANK = 2**31 - 1  # folded into a step's key for the drawn rank; micro-batches fold in their numbers from 0


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or an update was not finite; the state is that of the step before."""

    exit_code = 3

    def __init__(self, step: int, leaf: str):
        self.step, self.leaf = step, leaf
        super().__init__(f"step {step}: {leaf} is not finite: lower learning_rate, or check the data of this step")


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      step: int32 scalar, optimiser steps done.
      adapters: trained leaves, {site path: {leaf: array}}, float32.
      adapter_state: saved leaves that no gradient reaches, in the same layout.
      opt_state: the optimiser's.
      rule_state: of the methods' rules; empty for methods without.
      key: (2,) uint32, the data of the root key; the key of a step is `fold_in(key, step)`.
    """

    step: Array
    adapters: Any
    adapter_state: Any
    opt_state: Any
    rule_state: Any
    key: Array


def language_model_loss(
    adapted: Adapted,
    head: Callable[[Params], HeadKernel] | None = None,
    chunk: int = 1024,
    softcap: float | None = None,
) -> Loss:
    """The next-token loss of a decoder.

    Args:
      adapted: around a decoder with arguments (input_ids, positions, segment_ids, output=).
      head: params -> the frozen head: the loss then holds a chunk of logits at a time. None takes whole logits, as a
        head that is itself trained or adapted needs.
      chunk: tokens whose logits may be alive at a time on each device.
      softcap: of the logits, or None.

    Returns:
      (variables, batch, adapter_inputs) -> (loss_sum, token_count), float32 scalars.
    """

    def loss(variables, batch, inputs):
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        if head is None:
            logits = adapted.apply(variables, *arguments, adapter_inputs=inputs)
            return cross_entropy(logits, batch["targets"], batch["loss_mask"])
        hidden = adapted.apply(variables, *arguments, output="hidden", adapter_inputs=inputs)
        hidden = with_logical_constraint(hidden, RESIDUAL)
        kernel, vocabulary_axis = head(variables["params"])
        axes = ("vocab", None) if vocabulary_axis == 0 else (None, "vocab")
        kernel = with_logical_constraint(jax.lax.stop_gradient(kernel), axes)  # gathered once, not in every chunk
        tokens = chunk * split_ways("batch", "length")
        told = (batch["targets"], batch["loss_mask"], tokens, softcap, vocabulary_axis)
        return chunked_cross_entropy(hidden, kernel, *told)

    return loss


def leaf_names(adapters: Any) -> tuple[str, ...]:
    """What `metrics["bad_leaf"]` counts: the loss, then each gradient, then each update."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(adapters)]
    return ("loss", *(f"gradient of {path}" for path in paths), *(f"update of {path}" for path in paths))


@dataclass(frozen=True)
class Step:
    """A compiled step: `step(state, params, batch) -> (state, metrics)`; the state is donated.

    `metrics` holds float32 scalars `loss` (mean over the tokens), `tokens`, `gradient_norm` (of loss and penalty) and
    for some methods `penalty`; int32 `bad_leaf` (an index into `leaf_names`, -1 when all is finite) and for some the
    drawn `rank`; and `statistics` of the routers, {site: {name: sums over tokens}}.
    """

    function: Any
    constants: Any
    names: tuple[str, ...]

    def __call__(self, state: TrainState, params: Params, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step."""
        return self.function(state, params, self.constants, batch)

    def lower(self, state: Any, params: Any, batch: Any) -> Any:
        """The lowered program, for arrays or shapes."""
        return self.function.lower(state, params, self.constants, batch)

    def cache_size(self) -> int:
        """How many programs were compiled."""
        return self.function._cache_size()


@dataclass(frozen=True)
class StateShardings:
    """Where everything of a step lives; a `batch` of None may be anywhere."""

    state: Any
    params: Any
    constants: Any
    batch: Any
    metrics: Any


def init_state(
    key: Array,
    adapted: Adapted,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    specs: Any = None,
    rules: Rules | None = None,
) -> tuple[TrainState, Any, StateShardings | None]:
    """The state before step one, made on the devices where it stays.

    Args:
      key: typed PRNG key of the run.
      adapted: with a resolved plan.
      params: the frozen base.
      optimizer: its state is made here; wrapped by the rules, where there are any.
      mesh: None leaves everything on the default device.
      specs: pytree of `PartitionSpec` like `params`; needed with a mesh.
      rules: of the plan, from `plan_rules`; may be left out where no method has rules.

    Returns:
      (state, constants of the adapters, shardings or None). The shardings are explicit, so that the second step finds
      what the first compiled.
    """
    plan = _plan(adapted)
    rules = _checked_rules(plan, rules)
    if mesh is None:
        state, constants = jax.jit(_start(plan, optimizer, rules))(key, params)
        return state, constants, None
    _, _, shardings = abstract_state(adapted, params, optimizer, mesh, specs, rules)
    make = jax.jit(
        _start(plan, optimizer, rules),
        in_shardings=(replicated(mesh), shardings.params),
        out_shardings=(shardings.state, shardings.constants),
    )
    state, constants = make(key, params)
    return state, constants, shardings


def abstract_state(
    adapted: Adapted,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    specs: Any,
    rules: Rules | None = None,
) -> tuple[TrainState, Any, StateShardings]:
    """What `init_state` returns, as shapes: nothing is allocated, and `mesh` may be of devices that are not there."""
    plan = _plan(adapted)
    make = _start(plan, optimizer, _checked_rules(plan, rules))
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    state, constants = jax.eval_shape(make, key, params)
    return state, constants, state_shardings(plan, state, constants, optimizer, specs, mesh)


def _start(plan: AdapterPlan, optimizer: optax.GradientTransformation, rules: Rules) -> Callable[..., Any]:
    """(key, params) -> (state before step one, constants of the adapters)."""

    def make(key, params):
        leaves = init_leaves(jax.random.fold_in(key, 0), plan, params)
        root = jax.random.key_data(jax.random.fold_in(key, 1))
        opt_state = optimizer.init(leaves.params)
        rule_state = rules.init(leaves, opt_state, optimizer)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, leaves.params, leaves.state, opt_state, rule_state, root), leaves.constants

    return make


def leaf_specs(plan: AdapterPlan, specs: Any, mesh: Mesh) -> Callable[[Any, Any], PartitionSpec]:
    """(path, leaf) -> the spec of a trained leaf of the plan, for bases that lie as `specs` say."""
    known = adapter_specs(plan, specs)

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        found: Any = known
        for part in path:
            found = found.get(part.key, PartitionSpec()) if isinstance(found, Mapping) else found
        return spread(found if isinstance(found, PartitionSpec) else PartitionSpec(), leaf, mesh)

    return spec


def put_leaves(leaves: Leaves, plan: AdapterPlan, specs: Any, mesh: Mesh) -> Leaves:
    """The leaves on the devices of `mesh`, each where a step has it; of several processes each gives all of them."""
    trained = jax.tree.map_with_path(leaf_specs(plan, specs, mesh), leaves.params)
    rest = jax.tree.map(lambda _: PartitionSpec(), (leaves.state, leaves.constants))
    return jax.tree.map(put, leaves, shardings_of(Leaves(trained, *rest), mesh))


def state_shardings(
    plan: AdapterPlan, state: TrainState, constants: Any, optimizer: Any, specs: Any, mesh: Mesh
) -> StateShardings:
    """Shardings for an (abstract) state: adapters follow their kernels, moments and copies follow their adapters."""
    spec = leaf_specs(plan, specs, mesh)

    def remembered(path, leaf):
        _, site, *_, name = path  # rule, site, whatever of it is remembered, leaf
        trained = state.adapters.get(site.key, {}).get(name.key)
        return spec((site, name), leaf) if trained is not None and trained.shape == leaf.shape else PartitionSpec()

    own = jax.tree.map_with_path(spec, state.adapters)
    rule_state = jax.tree.map_with_path(remembered, state.rule_state)
    whole = lambda tree: jax.tree.map(lambda _: PartitionSpec(), tree)  # noqa: E731 - one line, used twice
    moments = optax.tree.map_params(
        optimizer, lambda _, spec: spec, state.opt_state, own, transform_non_params=lambda _: PartitionSpec()
    )
    everywhere: Any = PartitionSpec()
    state_specs = TrainState(everywhere, own, whole(state.adapter_state), moments, rule_state, everywhere)
    return StateShardings(
        state=shardings_of(state_specs, mesh),
        params=shardings_of(specs, mesh),
        constants=shardings_of(whole(constants), mesh),
        batch=batch_sharding(mesh),
        metrics=replicated(mesh),
    )


def make_step(
    adapted: Adapted,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss,
    accumulate: int = 1,
    num_tasks: int = 0,
    constants: Any = None,
    shardings: StateShardings | None = None,
    adapters: Any = None,
    rules: Rules | None = None,
) -> Step:
    """The compiled training step.

    Args:
      adapted: with a resolved plan.
      optimizer: any optax optimiser, clipping and schedule inside, wrapped by the rules where there are any.
      loss: as `language_model_loss` returns it.
      accumulate: micro-batches a batch is split into; row i goes to micro-batch i mod `accumulate`.
      num_tasks: tasks that the router statistics tell apart.
      constants: of `init_state`.
      shardings: of `init_state`; None compiles for wherever the arguments are.
      adapters: (abstract) trained leaves, for the names in `Step.names`.
      rules: of the plan, from `plan_rules`; may be left out where no method has rules.
    """
    plan = _plan(adapted)
    rules = _checked_rules(plan, rules)
    tx = optax.with_extra_args_support(optimizer)
    mesh = None if shardings is None else shardings.metrics.mesh
    step = _one_step(plan, tx, rules, partial(sum_micro_batches, plan, accumulate, mesh, loss), num_tasks)
    options: dict[str, Any] = {"donate_argnums": 0, "compiler_options": compiler_options(mesh)}
    if shardings is not None:
        options["in_shardings"] = (shardings.state, shardings.params, shardings.constants, shardings.batch)
        options["out_shardings"] = (shardings.state, shardings.metrics)
    return Step(
        jax.jit(on_mesh(step, mesh), **options), {} if constants is None else constants, leaf_names(adapters or {})
    )


def _one_step(
    plan: AdapterPlan, tx: optax.GradientTransformationExtraArgs, rules: Rules, sums: Callable[..., Any], num_tasks: int
) -> Callable[..., Any]:
    """(state, params, constants, batch) -> (state, metrics), not compiled; `sums` are those of the micro-batches."""
    deterministic = not any(site.adapter.dropout for site in plan.sites)

    def step(state: TrainState, params, constants, batch):
        leaves = Leaves(state.adapters, state.adapter_state, constants)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
        rank = _draw_rank(plan, key)
        base = AdapterInputs(
            deterministic=deterministic, num_tasks=num_tasks, rank=rank, noise_step=state.step, wired=True
        )
        total, tokens, gradient, statistics = sums(leaves, params, batch, base, key)
        scale = 1.0 / jnp.maximum(tokens, 1.0)
        mean, gradient = total * scale, jax.tree.map(lambda g: g * scale, gradient)
        penalty, gradient = _add_penalty(plan, leaves, gradient)
        extra = {} if rank is None else {"rank": rank}
        updates, opt_state = tx.update(gradient, state.opt_state, state.adapters, **extra)
        bad = _first_bad(mean, gradient, updates)
        new = state._replace(
            step=state.step + 1,
            adapters=optax.apply_updates(state.adapters, updates),
            opt_state=opt_state,
            rule_state=rules.observe(state.rule_state, statistics),
        )
        new = jax.tree.map(lambda after, before: jnp.where(bad < 0, after, before), new, state)
        metrics = {"loss": mean, "tokens": tokens, "gradient_norm": optax.tree.norm(gradient), "bad_leaf": bad}
        routed = {path: sums for path, sums in statistics.items() if path in plan.gates or plan[path].adapter.num_gates}
        return new, metrics | penalty | ({} if rank is None else {"rank": rank}) | {"statistics": routed}

    return step


def _plan(adapted: Adapted) -> AdapterPlan:
    if adapted.plan is None:
        raise ValueError("training needs Adapted(base, plan=...): resolve_sites makes the plan")
    return adapted.plan


def _checked_rules(plan: AdapterPlan, rules: Rules | None) -> Rules:
    """The rules given, or none where no method has any.

    Raises:
      ValueError: a method has rules and none were given.
    """
    if rules is not None:
        return rules
    for site in plan.sites:
        if site.adapter.rules(1) or site.adapter.learning_rate_ratios:
            raise ValueError(
                f"{site.adapter.title} changes leaves while training: make rules = plan_rules(plan, total_steps), wrap "
                "the optimiser with rules.wrap, and give rules=rules"
            )
    return Rules()


def _draw_rank(plan: AdapterPlan, key: Array) -> Array | None:
    """The rank of this step, one for all sites, an int32 scalar; None for methods that draw none."""
    largest = max(site.adapter.largest_drawn_rank for site in plan.sites)
    return jax.random.randint(jax.random.fold_in(key, _RANK), (), 1, largest + 1) if largest else None


def _add_penalty(plan: AdapterPlan, leaves: Leaves, gradient: Any) -> tuple[dict[str, Array], Any]:
    """({"penalty": the methods' mean penalty}, the gradient with its own); ({}, gradient) without penalties."""
    if jax.eval_shape(lambda own: mean_penalty(plan, own), leaves) is None:
        return {}, gradient
    value, own = jax.value_and_grad(lambda adapters: mean_penalty(plan, leaves._replace(params=adapters)))(
        leaves.params
    )
    return {"penalty": value}, jax.tree.map(jnp.add, gradient, own)


def _first_bad(loss: Array, gradient: Any, updates: Any) -> Array:
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradient, updates))]
    good = jnp.stack(flags)
    return jnp.where(jnp.all(good), -1, jnp.argmin(good)).astype(jnp.int32)
