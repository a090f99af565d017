"""Runs the methods' rules: update rules around any optimiser, event rules on a training state, penalties."""

from mor_jax.optim.event_rules import EventRule
from mor_jax.optim.rules import LearningRates, Rules, mean_penalty, plan_rules
from mor_jax.optim.update_rules import UpdateRule, UpdateRuleState

__all__ = [
    "EventRule",
    "LearningRates",
    "Rules",
    "UpdateRule",
    "UpdateRuleState",
    "mean_penalty",
    "plan_rules",
]
