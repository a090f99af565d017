"""A method's ``UpdateTransform`` around an optimiser: it sees raw gradients before it and updates after it.

    wrapped = UpdateRule(DrawnRanksOnly(), paths=("layers/mlp/up_proj",)).wrap(optax.adamw(1e-3))
    updates, state = wrapped.update(gradients, state, params, rank=k)

Leaves are found by their place in the tree, {site path: {leaf name: array}}, and everything is mapped leaf by leaf, so
that trees masked by ``optax.masked`` or ``partition`` pass, and state made under ``eval_shape`` has the same shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mor_jax.adapters.rules import UpdateTransform


class UpdateRuleState(NamedTuple):
    """State of a wrapped optimiser.

    Attributes:
        inner: The optimiser's own.
        accumulators: {name: tree like the parameters, float32}; found with ``optax.tree.get(state, name)``.
    """

    inner: Any
    accumulators: dict[str, Any]


def leaf_place(path: Any) -> tuple[str, str]:
    """(site path, leaf name) of a leaf's path in {site path: {leaf name: array}}."""
    site, _, leaf = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
    return site, leaf


@dataclass(frozen=True)
class UpdateRule:
    """A transform and the sites that it is for.

    Attributes:
        transform: The method's.
        paths: Of its sites; None is every leaf. All other leaves pass unchanged.
    """

    transform: UpdateTransform
    paths: tuple[str, ...] | None = None

    def wrap(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """``inner`` with the transform before and after it.

        ``update`` takes the transform's scalars as keyword arguments beside those of ``inner``, and raises ValueError
        when one of them, or the parameters that an accumulator needs, is missing.
        """
        inner = optax.with_extra_args_support(inner)
        transform = self.transform

        def init(params: Any) -> UpdateRuleState:
            # Mapped over any tree: optax finds moments by running init on a placeholder.
            zeros = {name: optax.tree.zeros_like(params, dtype=jnp.float32) for name in transform.accumulators}
            return UpdateRuleState(inner.init(params), zeros)

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
            missing = [name for name in transform.scalars if extra_args.get(name) is None]
            if missing:
                raise ValueError(f"{type(transform).__name__} needs update(..., {missing[0]}=scalar)")
            scalars = {name: extra_args[name] for name in transform.scalars}
            accumulators = self._accumulate(updates, state.accumulators, params)
            updates = self._map(lambda leaf, value: transform.gradient(leaf, value, scalars), updates)
            updates, own = inner.update(updates, state.inner, params, **extra_args)
            updates = self._map(lambda leaf, value: transform.update(leaf, value, scalars), updates)
            return updates, UpdateRuleState(own, accumulators)

        return optax.GradientTransformationExtraArgs(init, update)

    def _concerns(self, site: str) -> bool:
        return self.paths is None or site in self.paths

    def _map(self, function: Any, tree: Any) -> Any:
        def one(path: Any, value: Array) -> Array:
            site, leaf = leaf_place(path)
            return function(leaf, value).astype(value.dtype) if self._concerns(site) else value

        return jax.tree.map_with_path(one, tree)

    def _accumulate(self, gradients: Any, kept: dict[str, Any], params: Any) -> dict[str, Any]:
        if not kept:
            return kept
        if params is None:
            raise ValueError(f"{type(self.transform).__name__} needs update(gradients, state, params)")
        flat, treedef = jax.tree.flatten_with_path(gradients)
        columns = {name: treedef.flatten_up_to(tree) for name, tree in kept.items()}
        for index, ((path, gradient), param) in enumerate(zip(flat, treedef.flatten_up_to(params), strict=True)):
            if self._concerns(leaf_place(path)[0]):
                own = {name: column[index] for name, column in columns.items()}
                for name, value in self.transform.accumulate(param, gradient, own).items():
                    columns[name][index] = value
        return {name: treedef.unflatten(column) for name, column in columns.items()}
