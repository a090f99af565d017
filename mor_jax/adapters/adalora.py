"""AdaLoRA (arXiv 2303.10512; PEFT's code): triplets (a_i, e_i, b_i) that compete for a shrinking budget.

    delta = s ((x a) * e) b,  s = alpha / initial_rank
    s(p) = I(p) U(p), I and U running means (beta 0.85) of |p dL/dp| and of |that - I|       eqs. 9-11
    S_i = s(e_i) + mean_j s(a_ji) + mean_j s(b_ij)                                           eq. 8
    budget(t): initial until ``start``, then target + (initial - target) (1 - (t - start) / (end - start))^3

Every ``interval`` steps the e of all triplets but the budget(t) best of the whole model become 0; they may grow again.
At the step ``end`` the choice is final: a mask in the state. The gradient is the raw one, before clipping, at the
parameters that it was taken at (eq. 10; PEFT multiplies it with the parameters after the update).
The penalty is 0.1 (||a^T a - I||_F + ||b b^T - I||_F), the mean over sites and layers; PEFT's is the mean over factors,
half of it. Ours: start, end and interval as shares of the run (the paper tunes them for each task).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.diagonal import DiagonalLoRA
from mor_jax.adapters.rules import Event, EventCall, EventResult, UpdateTransform, split_sites, stack_sites

INIT_STD = 0.02


@dataclass(frozen=True)
class Sensitivity(UpdateTransform):
    """Running means of each entry's sensitivity and of its deviation from them."""

    accumulators: ClassVar[tuple[str, ...]] = ("sensitivity", "uncertainty")

    decay: float  # beta_1 = beta_2

    def accumulate(self, param: Array, gradient: Array, kept: Mapping[str, Array]) -> dict[str, Array]:
        """Equations 10 and 11."""
        now = jnp.abs(param * gradient).astype(jnp.float32)
        mean = self.decay * kept["sensitivity"] + (1 - self.decay) * now
        spread = self.decay * kept["uncertainty"] + (1 - self.decay) * jnp.abs(now - mean)
        return {"sensitivity": mean, "uncertainty": spread}


@dataclass(frozen=True)
class CutBudget(Event):
    """Keeps the triplets within the budget."""

    name: ClassVar[str] = "cut"

    initial_rank: int
    rank: int
    start: int  # last step of the full budget
    end: int  # step of the final cut
    interval: int

    def due(self, step: int) -> bool:
        """Every ``interval`` steps after ``start``, last at ``end``."""
        return self.start < step < self.end and step % self.interval == 0 or step == self.end

    def budget(self, step: int, count: int) -> int:
        """Triplets that stay after a step, of ``count`` sites and layers."""
        initial, target = self.initial_rank * count, self.rank * count
        if step <= self.start or step >= self.end:
            return initial if step < self.end else target
        return int((initial - target) * (1 - (step - self.start) / (self.end - self.start)) ** 3 + target)

    def apply(self, call: EventCall) -> EventResult:
        """Writes 0 to each e outside the budget, and at ``end`` to its mask."""
        scores = stack_sites({path: self._scores(call, path) for path in call.leaves})
        count = len(scores)
        budgets = [self.budget(step, count) for step in range(0, self.end + 1, self.interval)]
        final = call.step >= self.end
        budget = jnp.where(final, self.rank * count, jnp.array(budgets, jnp.int32)[call.step // self.interval])
        place = jnp.argsort(jnp.argsort(-scores.ravel())).reshape(scores.shape)
        leaves = {}
        for path, keep in split_sites(place < budget, call.leaves).items():
            own = call.leaves[path]
            mask = jnp.where(final, keep.astype(jnp.float32), own.state["mask"])
            params = {**own.params, "e": jnp.where(keep, own.params["e"], 0.0)}
            leaves[path] = own._replace(params=params, state={"mask": mask})
        return EventResult(leaves, call.state, report={"budget": budget})

    def _scores(self, call: EventCall, path: str) -> Array:
        kept = call.accumulated
        score = {leaf: kept["sensitivity"][path][leaf] * kept["uncertainty"][path][leaf] for leaf in ("a", "b", "e")}
        return score["e"] + score["a"].mean(-2) + score["b"].mean(-1)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(DiagonalLoRA):
    """Adaptive budget allocation."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "2303.10512"
    rule_name: ClassVar[str] = "budget"
    trained_weight: ClassVar[str] = "e"

    rank: int = 8  # mean rank at the end
    initial_rank: int = 0  # at the start; 0 is half as much again as rank
    alpha: float = 16.0  # numerator of the scale
    start_fraction: float = 0.1  # of the steps with the full budget
    final_fraction: float = 0.3  # of the steps with the final ranks
    interval: int = 10  # steps between cuts
    decay: float = 0.85  # of the running means
    orthogonality_weight: float = 0.1  # of the penalty

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("alpha", "interval")
        if self.initial_rank and self.initial_rank < self.rank:
            raise ValueError(f"AdaLoRA.initial_rank must be at least rank = {self.rank}, got {self.initial_rank}")
        if not 0 <= self.decay < 1 or self.orthogonality_weight < 0:
            raise ValueError(f"AdaLoRA.decay must be in [0, 1) and orthogonality_weight not negative, got {self}")
        if min(self.start_fraction, self.final_fraction) < 0 or self.start_fraction + self.final_fraction >= 1:
            raise ValueError(f"AdaLoRA.start_fraction and final_fraction must leave room for the cuts, got {self}")

    @property
    def width(self) -> int:
        """The rank at the start."""
        return self.initial_rank or self.rank + (self.rank + 1) // 2

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, width), "b": (width, out), "e": (width,)}, normal with 0.02 and e 0; state {"mask": (width,)}."""
        key_a, key_b = jax.random.split(key)
        a = INIT_STD * jax.random.normal(key_a, (site.in_features, self.width), jnp.float32)
        b = INIT_STD * jax.random.normal(key_b, (self.width, site.out_features), jnp.float32)
        return Leaves({"a": a, "b": b, "e": jnp.zeros(self.width, jnp.float32)}, {"mask": jnp.ones(self.width)})

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """s e on the triplets that are left."""
        return self.alpha / self.width * leaves.params["e"] * leaves.state["mask"]

    def penalty(self, leaves: Leaves) -> Array:
        """0.1 (||a^T a - I||_F + ||b b^T - I||_F)."""
        a, b = leaves.params["a"], leaves.params["b"]
        squares = [jnp.sum(jnp.square(gram - jnp.eye(self.width))) for gram in (a.T @ a, b @ b.T)]
        norms = [jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny)) for square in squares]
        return self.orthogonality_weight * (norms[0] + norms[1])

    def rules(self, total_steps: int) -> tuple[UpdateTransform | Event, ...]:
        """The running means and the cuts."""
        start = int(self.start_fraction * total_steps)
        end = max(start + 1, total_steps - int(self.final_fraction * total_steps))
        return Sensitivity(self.decay), CutBudget(self.width, self.rank, start, end, self.interval)
