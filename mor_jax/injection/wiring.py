"""What a method brings for training beside its leaves, and whether the loop that differentiates it does any of it.

A training step of one's own runs ``Adapted.apply`` under ``jax.grad``. Dropout, learning rates, rules and penalties are
then nobody's business unless that loop makes them its own, so the first derivative says what is left out. A draw of
ranks is more: without it another method would be trained, so that is an error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from mor_jax.adapters import Adapter, AdapterInputs, Leaves
from mor_jax.injection.leaves import over_layers, site_leaves
from mor_jax.injection.plan import AdaptedSite, AdapterPlan
from mor_jax.injection.targets import InjectionError

_LOGGER = logging.getLogger(__name__)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _noticed(tell: Callable[[], None], value: Array) -> Array:
    """``value``; ``tell`` is called when it is differentiated."""
    return value


@_noticed.defjvp
def _noticed_jvp(tell, primals, tangents):
    tell()
    return primals[0], tangents[0]


def watch_derivatives(plan: AdapterPlan, leaves: Leaves, inputs: AdapterInputs) -> Leaves:
    """The leaves; differentiating those of a method whose training the loop leaves out says so, once.

    Raises:
        InjectionError: when a method that draws ranks is differentiated without ``AdapterInputs.rank``.
    """
    missing = {s.site.path: _left_out(s, leaves, inputs) for s in plan.sites}
    told = tuple(dict.fromkeys(word for words in missing.values() for word in words))
    params: dict[str, Any] = dict(leaves.params)
    for adapted in plan.sites:
        path, rank = adapted.site.path, adapted.adapter.largest_drawn_rank
        undrawn = adapted.adapter if rank and inputs.rank is None else None
        if missing[path] or undrawn is not None:
            tell = partial(_tell, undrawn, told)
            params[path] = jax.tree.map(partial(_noticed, tell), params.get(path, {}))
    return leaves._replace(params=params)


def _left_out(adapted: AdaptedSite, leaves: Leaves, inputs: AdapterInputs) -> tuple[str, ...]:
    """What the site's method brings and the caller leaves out."""
    method, own = adapted.adapter, site_leaves(leaves, adapted.site.path)
    if inputs.wired or not own.params:
        return ()
    found = []
    if method.rule:
        found.append(f"{method.title}'s {method.rule}")
    found += [f"{method.title}'s {name}" for name in method.training_inputs if getattr(inputs, name) is None]
    if method.learning_rate_ratios:
        found.append(f"{method.title}'s learning rates of its own")
    if method.dropout and inputs.deterministic:
        found.append(f"dropout={method.dropout}")
    if type(method).penalty is not Adapter.penalty and _has_penalty(adapted, own):
        found.append(f"{method.title}'s penalty")
    if inputs.auxiliary_scale is None and _has_balance_loss(method):
        found.append(f"{method.title}'s balance loss")
    return tuple(found)


def _has_penalty(adapted: AdaptedSite, own: Leaves) -> bool:
    return jax.eval_shape(over_layers(adapted.adapter.penalty, adapted), own) is not None


@functools.lru_cache(maxsize=1024)
def _has_balance_loss(method: Adapter) -> bool:
    gates = jax.ShapeDtypeStruct((1, method.num_gates), "float32")
    return bool(method.num_gates) and jax.eval_shape(lambda gates: method.balance(gates, None), gates) is not None


def _tell(undrawn: Adapter | None, left_out: tuple[str, ...]) -> None:
    if undrawn is not None:
        raise InjectionError(
            f"{undrawn.title} learns one drawn rank a step, and none is given: pass AdapterInputs(rank=k) with k drawn "
            f"from 1 to {undrawn.largest_drawn_rank} and wrap the optimiser by plan_rules, or use make_step"
        )
    if left_out:
        _warn_once(left_out)


@functools.lru_cache(maxsize=1024)
def _warn_once(left_out: tuple[str, ...]) -> None:
    _LOGGER.warning(
        "this training loop leaves out %s: make_step does it; in a loop of your own plan_rules(plan, steps) has rules "
        "and learning rates, mean_penalty penalties, AdapterInputs(key=, deterministic=False, auxiliary_scale=, "
        "noise_step=) the rest, and AdapterInputs(wired=True) says that it is done",
        ", ".join(left_out),
    )
