"""ReMoRA's rule (arXiv 2405.12130, section 3.3; the authors' code): fold M, zero it, go on with the next group type.

The base is never written: M is added to the accumulator of its type, so the model computes the same before and after.
"Reset the optimiser" (the paper) sets the moments of M to 0, as the released trainer does; counts go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.rules import Event, EventCall, EventResult


@dataclass(frozen=True)
class FoldMatrix(Event):
    """Every ``interval`` steps but the last, after which nothing would train the new M."""

    name: ClassVar[str] = "fold"

    interval: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether M is folded after ``step``."""
        return step % self.interval == 0 and step < self.total_steps

    def apply(self, call: EventCall) -> EventResult:
        """Writes m: (layers, k, k), accumulated: (layers, types, k, k) and group_type: (layers, 1)."""
        leaves, group = {}, jnp.zeros((), jnp.int32)
        for path, own in call.leaves.items():
            m, kind, kept = own.params["m"], own.state["group_type"], own.state["accumulated"]
            current = (jnp.arange(kept.shape[1]) == kind)[..., None, None]
            following = (kind + 1) % kept.shape[1]
            state = {"accumulated": jnp.where(current, kept + m[:, None], kept), "group_type": following}
            group = following[0, 0]
            leaves[path] = own._replace(params={**own.params, "m": jnp.zeros_like(m)}, state={**own.state, **state})

        def moments(path: str, leaf: str, number: int, moment: Array) -> Array:
            return jnp.zeros_like(moment) if leaf == "m" else moment

        return EventResult(leaves, call.state, moments, {"group_type": group})
