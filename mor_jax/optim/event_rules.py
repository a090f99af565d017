"""A method's ``Event`` on a training state: it rewrites leaves and moments exactly, whatever the optimiser.

An event sees each site with one leading layer axis, however the model stacks its layers. Moments are all trees in the
optimiser's state that look like the parameters (``optax.tree.map_params``); entries of another shape, such as
adafactor's factored ones, stay, and so do counts: a step size that corrects for its start does not start again.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.rules import Event, EventCall, SiteArrays, SiteLeaves, SiteMoments
from mor_jax.optim.update_rules import leaf_place

Score = Callable[[Leaves], Array]  # a whole model's leaves -> scalar, higher is better


@dataclass(frozen=True)
class _Place:
    """Where a moment belongs; not a pytree, so that it can stand for a leaf."""

    site: str
    leaf: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EventRule:
    """An event and the sites that it is for.

    Attributes:
        event: The method's.
        sites: (path, sizes of its leading layer axes) of each.
        accumulators: Names of the running arrays that the method's update rules keep in the optimiser's state.
    """

    event: Event
    sites: tuple[tuple[str, tuple[int, ...]], ...]
    accumulators: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The event's, in the log and in its key."""
        return self.event.name

    def due(self, step: int) -> bool:
        """Whether it happens after optimiser step ``step``, counted from 1."""
        return self.event.due(step)

    def init(self, leaves: Leaves, opt_state: Any = None, optimizer: optax.GradientTransformation | None = None) -> Any:
        """The rule's state before the first step, arrays of its own: nothing is shared with the leaves.

        Without the optimiser and its state an event that keeps moments keeps none.
        """
        moments = {} if optimizer is None else self._moments_of(opt_state, leaves.params, optimizer)
        return jax.tree.map(lambda value: value.copy(), self.event.init(self._sites_of(leaves), moments))

    def observe(self, rule_state: SiteArrays, statistics: Mapping[str, Any]) -> SiteArrays:
        """The rule's state after one more optimiser step; ``statistics``: {path: {name: (layers..., ...)}}."""
        return self.event.observe(rule_state, self._arrays_of(statistics)) if rule_state else rule_state

    def apply(
        self,
        leaves: Leaves,
        opt_state: Any,
        rule_state: SiteArrays,
        key: Array,
        score: Score,
        *,
        step: Array,
        optimizer: optax.GradientTransformation,
    ) -> tuple[Leaves, Any, SiteArrays, dict[str, Array]]:
        """The event; pure, with static shapes, to be jitted once.

        Args:
            leaves: Of the whole model, as injection lays them out.
            opt_state: The optimiser's, update rules included.
            rule_state: This rule's.
            key: Root PRNG key; the event's own is folded from it with the step and the rule's name.
            score: Of a whole model's leaves, on a development batch.
            step: int32 scalar, optimiser steps done.
            optimizer: What made ``opt_state``.

        Returns:
            (leaves, opt_state, rule_state, report): the report holds small arrays for the log.
        """
        accumulated = {name: self._arrays_of(optax.tree.get(opt_state, name)) for name in self.accumulators}
        call = EventCall(
            leaves=self._sites_of(leaves),
            state=rule_state,
            accumulated=accumulated,
            key=jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(self.name.encode())),
            step=step,
            score=lambda changed: score(self._written(leaves, changed)),
            moments=self._moments_of(opt_state, leaves.params, optimizer),
        )
        result = self.event.apply(call)
        if result.moments is not None:
            opt_state = self._mapped(opt_state, leaves.params, optimizer, result.moments)
        return self._written(leaves, result.leaves), opt_state, result.state, result.report

    def _flat(self, value: Array, layers: tuple[int, ...]) -> Array:
        return value.reshape(math.prod(layers), *value.shape[len(layers) :])

    def _arrays_of(self, tree: Mapping[str, Any]) -> Any:
        return {
            path: jax.tree.map(lambda v, n=layers: self._flat(v, n), tree[path])
            for path, layers in self.sites
            if path in tree
        }

    def _sites_of(self, leaves: Leaves) -> SiteLeaves:
        trees = [self._arrays_of(tree) for tree in leaves]
        return {path: Leaves(*(tree.get(path, {}) for tree in trees)) for path, _ in self.sites}

    def _written(self, leaves: Leaves, changed: SiteLeaves) -> Leaves:
        """A whole model's leaves with those of the sites replaced; constants are never written."""
        trees: list[dict[str, Any]] = [dict(tree) for tree in leaves]
        for path, layers in self.sites:
            for tree, own in zip(trees[:2], changed[path], strict=False):
                if own:
                    tree[path] = {n: v.reshape(*layers, *v.shape[1:]) for n, v in own.items()}
        return Leaves(*trees)

    def _moments_of(self, opt_state: Any, params: Any, optimizer: optax.GradientTransformation) -> SiteMoments:
        """The moments of an event that wants them, empty for others."""
        found: SiteMoments = {}
        if self.event.remembers_moments:

            def collect(path: str, leaf: str, number: int, moment: Array) -> Array:
                own = found.setdefault(path, {})
                own[leaf] = (*own.get(leaf, ()), moment)
                return moment

            self._mapped(opt_state, params, optimizer, collect)
        return found

    def _mapped(
        self,
        opt_state: Any,
        params: Any,
        optimizer: optax.GradientTransformation,
        function: Callable[[str, str, int, Array], Array],
    ) -> Any:
        """``opt_state`` with ``function`` of (path, leaf, number, moment (layers, ...)) in place of each moment."""
        layers_of = dict(self.sites)
        places = jax.tree.map_with_path(lambda path, value: _Place(*leaf_place(path), value.shape), params)
        met: Counter[_Place] = Counter()

        def one(moment: Any, place: _Place) -> Any:
            if place.site not in layers_of or getattr(moment, "shape", None) != place.shape:
                return moment
            number, met[place] = met[place], met[place] + 1
            own = function(place.site, place.leaf, number, self._flat(moment, layers_of[place.site]))
            return own.reshape(moment.shape).astype(moment.dtype)

        is_masked = lambda value: isinstance(value, optax.MaskedNode)  # noqa: E731 - names an argument
        return optax.tree.map_params(optimizer, one, opt_state, places, is_leaf=is_masked)
