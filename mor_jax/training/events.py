"""The methods' event rules in a run: each compiled once, run right after the updates of the steps that it is due on.

The score that some of them ask for is minus the loss on one batch: the first held-out batch, always the same one, or
the batch of the step where nothing is held out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mor_jax.adapters import AdapterInputs, Leaves
from mor_jax.optim import EventRule, Rules
from mor_jax.processes import is_first
from mor_jax.training.accumulation import batch_inputs
from mor_jax.training.backend import compiler_options
from mor_jax.training.sharding import on_mesh
from mor_jax.training.step import Loss, StateShardings, TrainState

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Events:
    """Calling it runs the rules that are due after a step.

    Attributes:
      rules: of the plan.
      functions: {name: compiled (state, params, constants, batch) -> (state, report)}; the state is donated.
      constants: of the adapters.
      batch: on the devices, to score on; None takes the step's.
    """

    rules: Rules
    functions: Mapping[str, Any]
    constants: Any
    batch: Any = None

    def __call__(self, step: int, state: TrainState, params: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """(the state after the events of step `step`, {event: its report, on the devices})."""
        reports = {}
        for name, rule in self.rules.due(step):
            state, reports[rule.name] = self.functions[name](state, params, self.constants, self._scored(batch))
        return state, reports

    def compile(self, steps: range, state: TrainState, params: Any, batch: Any) -> None:
        """Compiles the rules that are due after any of these steps, for batches like this one."""
        due = dict.fromkeys(name for step in steps for name, _ in self.rules.due(step))  # all processes in one order
        for name in due:
            self.functions[name].lower(state, params, self.constants, self._scored(batch)).compile()

    def cache_size(self) -> int:
        """How many programs were compiled."""
        return sum(function._cache_size() for function in self.functions.values())

    def _scored(self, batch: Any) -> Any:
        return batch if self.batch is None else self.batch


def warn_of(rules: Rules, step: int, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Logs, on the first process, what the events have to warn of in their reports of a step, fetched by now."""
    by_name = {rule.name: rule.event for rule in rules.events}
    for name, report in reports.items():
        message = by_name[name].warning(report)
        if message and is_first():
            _LOGGER.warning("step %d: %s", step, message)


def make_events(
    rules: Rules,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss,
    constants: Any = None,
    shardings: StateShardings | None = None,
    batch: Any = None,
) -> Events:
    """The events of a run.

    Args:
      rules: of the plan.
      optimizer: that of the step, wrapped by the rules.
      loss: as `language_model_loss` returns it.
      constants: of `init_state`.
      shardings: of `init_state`; None compiles for wherever the arguments are.
      batch: on the devices, to score on; None takes the step's.
    """
    mesh = None if shardings is None else shardings.batch.mesh
    options: dict[str, Any] = {"donate_argnums": 0, "compiler_options": compiler_options(mesh)}
    if shardings is not None:
        options["in_shardings"] = (shardings.state, shardings.params, shardings.constants, shardings.batch)
        options["out_shardings"] = (shardings.state, shardings.metrics)
    functions = {}
    for number, rule in enumerate(rules.events):
        name = rules.name_of(number)
        functions[name] = jax.jit(on_mesh(_event(name, rule, optimizer, loss), mesh), **options)
    return Events(rules, functions, {} if constants is None else constants, batch)


def _event(name: str, rule: EventRule, optimizer: optax.GradientTransformation, loss: Loss) -> Any:
    def event(state: TrainState, params: Any, constants: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        def score(leaves: Leaves) -> jax.Array:
            if not rule.event.scores:
                raise TypeError(f"{type(rule.event).__name__} asks for a score: set its scores = True")
            collections = {"adapters": leaves.params, "adapter_state": leaves.state, "adapter_constants": constants}
            inputs = batch_inputs(AdapterInputs(deterministic=True), batch, None)
            total, tokens = loss({"params": params, **collections}, batch, inputs)
            return -total / jnp.maximum(tokens, 1.0)

        own = state.rule_state.get(name, {})
        leaves, opt_state, own, report = rule.apply(
            Leaves(state.adapters, state.adapter_state, {}),
            state.opt_state,
            own,
            jax.random.wrap_key_data(state.key, impl="threefry2x32"),
            score,
            step=state.step,
            optimizer=optimizer,
        )
        rule_state = state.rule_state | {name: own} if own else state.rule_state
        new = state._replace(
            adapters=leaves.params, adapter_state=leaves.state, opt_state=opt_state, rule_state=rule_state
        )
        return new, report

    return event
