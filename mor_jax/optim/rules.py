"""The rules of a whole plan: sites whose rules are equal act as one, each rule is bound to its sites.

rules = plan_rules(plan, total_steps)
optimizer = rules.wrap(optimizer)            # update rules and learning rates
rule_state = rules.init(leaves, optimizer.init(leaves.params), optimizer)
rule_state = rules.observe(rule_state, statistics)   # inside every step
for rule in rules.due(step): rule.apply(...)         # after the updates of that step
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.rules import UpdateTransform
from mor_jax.injection import AdapterPlan
from mor_jax.injection.leaves import over_layers, site_leaves
from mor_jax.optim.event_rules import EventRule
from mor_jax.optim.update_rules import UpdateRule


@dataclass(frozen=True)
class LearningRates(UpdateTransform):
    """Multiplies updates, weight decay included, so that a leaf learns at its own rate (LoRA+, arXiv 2402.12354)."""

    ratios: tuple[tuple[str, float], ...]  # (leaf name, its rate over that of the run)

    def update(self, leaf: str, update: Array, scalars: Mapping[str, Array]) -> Array:
        """The update times the leaf's ratio."""
        return update * dict(self.ratios).get(leaf, 1.0)


@dataclass(frozen=True)
class Rules:
    """All rules of a plan; hashable and static."""

    updates: tuple[UpdateRule, ...] = ()
    events: tuple[EventRule, ...] = ()

    def wrap(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The optimiser with every update rule around it."""
        for rule in self.updates:
            optimizer = rule.wrap(optimizer)
        return optax.with_extra_args_support(optimizer)

    def init(
        self, leaves: Leaves, opt_state: Any = None, optimizer: optax.GradientTransformation | None = None
    ) -> dict[str, Any]:
        """{index and name of an event rule: its state}; empty for rules without state.

        Args:
            leaves: Of the whole model.
            opt_state: Of ``optimizer``, before the first step, for rules that keep moments.
            optimizer: The wrapped one.
        """
        states = {self.name_of(n): rule.init(leaves, opt_state, optimizer) for n, rule in enumerate(self.events)}
        return {name: state for name, state in states.items() if state}

    def observe(self, rule_state: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
        """The state after one more optimiser step with these statistics."""
        named = {self.name_of(number): rule for number, rule in enumerate(self.events)}
        return {name: named[name].observe(state, statistics) for name, state in rule_state.items()}

    def due(self, step: int) -> tuple[tuple[str, EventRule], ...]:
        """The (name in the state, rule) pairs that happen after optimiser step ``step``, counted from 1."""
        return tuple((self.name_of(n), rule) for n, rule in enumerate(self.events) if rule.due(step))

    def name_of(self, number: int) -> str:
        """The key of event rule ``number`` in the rules' state."""
        return f"{number}-{self.events[number].name}"


def plan_rules(plan: AdapterPlan, total_steps: int) -> Rules:
    """The rules that the plan's methods bring for a run of ``total_steps`` optimiser steps.

    Raises:
        ValueError: two sites need accumulators of one name with different settings.
    """
    updates: dict[UpdateTransform, list[str]] = {}
    events: dict[Any, list[tuple[str, tuple[int, ...]]]] = {}
    reads: dict[Any, tuple[str, ...]] = {}
    for adapted in plan.sites:
        method, path = adapted.adapter, adapted.site.path
        own = method.rules(total_steps)
        transforms = [rule for rule in own if isinstance(rule, UpdateTransform)]
        for rule in own:
            if not isinstance(rule, UpdateTransform):
                events.setdefault(rule, []).append((path, adapted.stack_sizes))
                reads[rule] = tuple(name for transform in transforms for name in transform.accumulators)
        if method.learning_rate_ratios:
            transforms.append(_learning_rates(adapted))
        for transform in transforms:
            updates.setdefault(transform, []).append(path)
    kept = [name for transform in updates for name in transform.accumulators]
    if len(set(kept)) < len(kept):
        raise ValueError(f"sites keep {kept[0]!r} with different settings: give them the same decay")
    return Rules(
        tuple(UpdateRule(transform, tuple(paths)) for transform, paths in updates.items()),
        tuple(EventRule(event, tuple(sites), reads[event]) for event, sites in events.items()),
    )


def _learning_rates(adapted: Any) -> LearningRates:
    method, site = adapted.adapter, adapted.site
    labels = method.labels(method.logical_axes(site))
    ratios = {leaf: method.learning_rate_ratios.get(group, 1.0) for leaf, group in labels.items()}
    return LearningRates(tuple(sorted((leaf, ratio) for leaf, ratio in ratios.items() if ratio != 1.0)))


def mean_penalty(plan: AdapterPlan, leaves: Leaves) -> Array | None:
    """The mean over sites and layers of the methods' penalties, a float32 scalar, or None where no method has one."""
    total, count = jnp.zeros((), jnp.float32), 0
    for adapted in plan.sites:
        penalty, own = adapted.adapter.penalty, site_leaves(leaves, adapted.site.path)
        each = over_layers(penalty, adapted)(own)
        if each is None:
            continue
        total += jnp.sum(each)
        count += math.prod(adapted.stack_sizes)
    return total / count if count else None
