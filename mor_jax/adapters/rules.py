"""What a method does while training beside following its gradient, as pure functions without optax.

``UpdateTransform`` works on one leaf inside every optimiser step: it may mask the gradient, keep running sums of it and
change the update. ``Event`` rewrites a whole model's leaves on a few steps. A method returns them from
``Adapter.rules``; ``mor_jax.optim`` wraps the first around an optimiser and runs the second on a training state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mor_jax.adapters.base import Leaves

SiteLeaves = dict[str, Leaves]  # by site path; every array has exactly one leading layer axis
SiteArrays = dict[str, dict[str, Array]]  # {site path: {name: (layers, ...)}}
SiteMoments = dict[str, dict[str, tuple[Array, ...]]]  # {site path: {leaf: one (layers, ...) for each kind of moment}}


def stack_sites(arrays: Mapping[str, Array]) -> Array:
    """(all layers of all sites, ...): the arrays (layers, ...) of each site, one below another."""
    return jnp.concatenate(list(arrays.values()))


def split_sites(stacked: Array, leaves: SiteLeaves) -> dict[str, Array]:
    """By site, its rows of what ``stack_sites`` laid out for sites in the order of ``leaves``."""
    layers = [jax.tree.leaves(own)[0].shape[0] for own in leaves.values()]
    return dict(zip(leaves, jnp.split(stacked, np.cumsum(layers)[:-1]), strict=True))


@dataclass(frozen=True)
class UpdateTransform:
    """A change of gradients and updates, leaf by leaf. Leaves are told apart by name; layer axes lead.

    Attributes:
        accumulators: Names of running arrays, one of each for every leaf, float32 and 0 at the start.
        scalars: Names of extra arguments that the optimiser's ``update`` must be given.
    """

    accumulators: ClassVar[tuple[str, ...]] = ()
    scalars: ClassVar[tuple[str, ...]] = ()

    def accumulate(self, param: Array, gradient: Array, kept: Mapping[str, Array]) -> dict[str, Array]:
        """The accumulators of one leaf after this step, from the raw gradient at ``param``."""
        return dict(kept)

    def gradient(self, leaf: str, gradient: Array, scalars: Mapping[str, Array]) -> Array:
        """What the optimiser sees instead of the gradient of the leaf named ``leaf``."""
        return gradient

    def update(self, leaf: str, update: Array, scalars: Mapping[str, Array]) -> Array:
        """What is added to the leaf instead of the optimiser's update."""
        return update


class EventCall(NamedTuple):
    """What an event is given.

    Attributes:
        leaves: Of the method's sites.
        state: The rule's own, as ``Event.init`` laid it out.
        accumulated: {accumulator: {path: {leaf: array}}} of the method's ``UpdateTransform``.
        key: A PRNG key of this step and rule.
        step: int32 scalar, optimiser steps done.
        score: Leaves of the method's sites -> scalar, higher is better, on a development batch.
        moments: The optimiser's, of an event that ``remembers_moments``.
    """

    leaves: SiteLeaves
    state: Any
    accumulated: Mapping[str, SiteArrays]
    key: Array
    step: Array
    score: Callable[[SiteLeaves], Array]
    moments: SiteMoments = {}


class EventResult(NamedTuple):
    """What an event leaves behind.

    Attributes:
        leaves: With every changed value written exactly.
        state: The rule's own.
        moments: (path, leaf, number, moment (layers, ...)) -> moment: how the optimiser's moments follow, of which a
            leaf has those of ``number`` 0, 1, … (Adam's two, none for SGD); None keeps them.
        report: Small arrays for the log.
    """

    leaves: SiteLeaves
    state: Any
    moments: Callable[[str, str, int, Array], Array] | None = None
    report: dict[str, Array] = {}


@dataclass(frozen=True)
class Event:
    """A pure rewrite of leaves, rule state and moments, run right after the updates of the steps that are due.

    Attributes:
        name: In the log, and in the rule's PRNG key.
        scores: Whether it calls ``score``: then the development batch decides what is trained.
        remembers_moments: Whether ``init`` and ``apply`` are given the optimiser's moments, to keep some of them.
    """

    name: ClassVar[str] = ""
    scores: ClassVar[bool] = False
    remembers_moments: ClassVar[bool] = False

    def due(self, step: int) -> bool:
        """Whether the event happens after optimiser step ``step``, counted from 1."""
        raise TypeError(f"{type(self).__name__} must define due")

    def init(self, leaves: SiteLeaves, moments: SiteMoments | None = None) -> Any:
        """The rule's state before the first step, {site path: arrays}; ``moments``: if it ``remembers_moments``."""
        return {}

    def observe(self, state: SiteArrays, statistics: SiteArrays) -> SiteArrays:
        """The state after one more optimiser step, due or not, from the sites' statistics summed over its tokens."""
        return state

    def apply(self, call: EventCall) -> EventResult:
        """The event itself: no Python branches on arrays, shapes unchanged."""
        raise TypeError(f"{type(self).__name__} must define apply")

    def warning(self, report: Mapping[str, Any]) -> str:
        """A sentence of warning about what ``apply`` reported, by then on the host; "" where all is well."""
        return ""
