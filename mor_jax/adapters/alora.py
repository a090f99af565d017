"""ALoRA (arXiv 2403.16187): ranks move, by ablation, from where they do not help to where they do.

    delta = ((x a) * gamma) b,  gamma in {0, 1} per rank, no alpha / r

Train for a while (K1), then up to 8 rounds, K2 apart. A round scores every rank rho of the model on one development
batch, IS(rho) = S(all) - S(all but rho) + S(only rho) with S = -cross-entropy, prunes the n_A lowest, and gives as many
new ranks to the sites (a linear map in a layer) that lost none: evenly, the remainder to the higher mean score. Where
every site lost one the budget shrinks. New ranks start as at the beginning, with fresh moments.

From the paper: the score, on 32 examples; n_A 7 for rank 8 on 7 linear maps, K1 = 1 epoch, K2 = 0.25 epoch, 8 rounds:
here 1/3 and 1/12 of the steps, which is 3 epochs. Ours: the batch is the first held-out micro-batch, so its size is
that of the run; sites are padded to ``max_rank`` and take no more, the next site takes it then; fresh moments are 0
while the optimiser's step count goes on. A site may lose all its ranks: it then trains nothing, its mean score counts
as -inf, so that it is the last in turn to be given some again, and the run warns of it. The best rank of the model is
never pruned, and a rank without which, or alone with which, the score is not a number is pruned first. Not PEFT's
"aLoRA" (Activated LoRA).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.diagonal import DiagonalLoRA, along_ranks
from mor_jax.adapters.low_rank import kaiming_uniform, start_factors
from mor_jax.adapters.rules import Event, EventCall, EventResult, SiteLeaves, split_sites, stack_sites


def with_gamma(leaves: SiteLeaves, gamma: Array) -> SiteLeaves:
    """Leaves whose gammas are the rows of ``gamma``: (sites, width), in the order of the paths and their layers."""
    rows = split_sites(gamma, leaves)
    return {path: own._replace(state={**own.state, "gamma": rows[path]}) for path, own in leaves.items()}


def ablation_scores(gamma: Array, score: Callable[[Array], Array]) -> Array:
    """IS of each rank that is on, (sites, width), and +inf elsewhere; two evaluations a rank, one after another.

    A score that is not a number is -inf.
    """
    flat, full = gamma.ravel(), score(gamma)

    def of_rank(index: Array) -> Array:
        alone = jnp.zeros_like(flat).at[index].set(1.0)
        others = score((flat * (1 - alone)).reshape(gamma.shape))
        found = full - others + score(alone.reshape(gamma.shape))
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    def one(index: Array) -> Array:
        return jax.lax.cond(flat[index] > 0, of_rank, lambda _: jnp.float32(jnp.inf), index)

    return jax.lax.map(one, jnp.arange(flat.size)).reshape(gamma.shape)


def reallocate(gamma: Array, scores: Array, count: int) -> tuple[Array, Array]:
    """(pruned, new), both (sites, width) bool: the ``count`` lowest scores, and the ranks given in their place.

    One rank of all is left at least. Sites without a rank come last in turn for new ones.
    """
    on = gamma > 0
    place = jnp.argsort(jnp.argsort(jnp.where(on, scores, jnp.inf).ravel())).reshape(gamma.shape)
    pruned = on & (place < jnp.minimum(count, jnp.sum(on) - 1))
    held = jnp.sum(on, 1)
    mean = jnp.where(held > 0, jnp.sum(jnp.where(on, scores, 0.0), 1) / jnp.maximum(held, 1), -jnp.inf)
    order = jnp.argsort(jnp.argsort(-mean))  # 0 for the best site
    room = jnp.where(pruned.any(1), 0, gamma.shape[1] - held)
    total = jnp.sum(pruned)

    def give(number: Array, given: Array) -> Array:
        turn = jnp.where(given < room, given * gamma.shape[0] + order, jnp.iinfo(jnp.int32).max)
        best = jnp.argmin(turn)
        return given.at[best].add(((number < total) & (given[best] < room[best])).astype(jnp.int32))

    given = jax.lax.fori_loop(0, count, give, jnp.zeros(gamma.shape[0], jnp.int32))
    free = ~on
    return pruned, free & (jnp.cumsum(free, 1) <= given[:, None])


@dataclass(frozen=True)
class ReallocateRanks(Event):
    """One round at each of ``steps``."""

    name: ClassVar[str] = "reallocate"
    scores: ClassVar[bool] = True

    steps: tuple[int, ...]
    count: int  # n_A
    width: int  # of all sites that it ranks together

    def due(self, step: int) -> bool:
        """The rounds' steps."""
        return step in self.steps

    def apply(self, call: EventCall) -> EventResult:
        """Writes gamma and the new ranks' factors and moments."""
        gamma = stack_sites({path: own.state["gamma"] for path, own in call.leaves.items()})
        scores = ablation_scores(gamma, lambda gamma: call.score(with_gamma(call.leaves, gamma)))
        pruned, new = reallocate(gamma, scores, self.count)
        leaves = with_gamma(call.leaves, ((gamma > 0) & ~pruned | new).astype(jnp.float32))
        fresh = split_sites(new, call.leaves)
        for path, own in leaves.items():
            a, b = own.params["a"], own.params["b"]
            start = kaiming_uniform(jax.random.fold_in(call.key, zlib.crc32(path.encode())), a.shape[1], a.shape)
            new_a, new_b = (along_ranks(leaf, fresh[path]) for leaf in ("a", "b"))
            leaves[path] = own._replace(params={"a": jnp.where(new_a, start, a), "b": jnp.where(new_b, 0.0, b)})

        def moments(path: str, leaf: str, number: int, moment: Array) -> Array:
            return jnp.where(along_ranks(leaf, fresh[path]), jnp.zeros_like(moment), moment)

        report = {"pruned": jnp.sum(pruned), "added": jnp.sum(new), "ranks": jnp.sum(gamma) - pruned.sum() + new.sum()}
        report["emptied"] = jnp.sum(pruned.any(1) & ~((gamma > 0) & ~pruned).any(1))
        return EventResult(leaves, call.state, moments, report)

    def warning(self, report: Mapping[str, Any]) -> str:
        """Where sites have lost their last rank."""
        if not report["emptied"]:
            return ""
        return (
            f"ALoRA has pruned the last rank of {int(report['emptied'])} sites, which train nothing until a round "
            f"gives them one; lower moved = {self.count}, or raise rank, where that is not wanted"
        )


@dataclass(frozen=True, kw_only=True)
class ALoRA(DiagonalLoRA):
    """Allocating LoRA."""

    name: ClassVar[str] = "alora"
    title: ClassVar[str] = "ALoRA"
    paper: ClassVar[str] = "2403.16187"
    rule_name: ClassVar[str] = "reallocation"

    rank: int = 8  # of every site at the start
    max_rank: int = 0  # that a site can grow to; 0 is twice the rank
    moved: int = 7  # n_A, ranks that a round moves
    rounds: int = 8
    first_fraction: float = 1 / 3  # K1, of the steps before the first round
    round_fraction: float = 1 / 12  # K2, of the steps between rounds

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("moved", "first_fraction", "round_fraction")
        self.require_not_negative("rounds")
        if self.max_rank and self.max_rank < self.rank:
            raise ValueError(f"ALoRA.max_rank must be at least rank = {self.rank}, got {self.max_rank}")

    @property
    def width(self) -> int:
        """The largest rank a site can grow to."""
        return self.max_rank or 2 * self.rank

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, width) uniform, "b": (width, out) zero}; state {"gamma": (width,)}, 1 for the first ``rank``."""
        gamma = (jnp.arange(self.width) < self.rank).astype(jnp.float32)
        return Leaves(start_factors(key, site, self.width), {"gamma": gamma})

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """gamma."""
        return leaves.state["gamma"]

    def rules(self, total_steps: int) -> tuple[Event, ...]:
        """The rounds, those that fall on the last step left out: nothing would train the new ranks."""
        steps = (self.first_fraction + number * self.round_fraction for number in range(self.rounds))
        rounded = sorted({max(1, round(total_steps * share)) for share in steps})
        return (ReallocateRanks(tuple(step for step in rounded if step < total_steps), self.moved, self.width),)

    def caution(self, sites: tuple[Site, ...]) -> str:
        """Where one round can prune what all sites have."""
        ranks = self.rank * sum(site.num_layers for site in sites)
        if not self.rounds or self.moved < ranks:
            return ""
        return (
            f"ALoRA prunes moved = {self.moved} ranks a round and all its {len(sites)} sites have {ranks} together: "
            "one rank will be left; choose a smaller moved"
        )

    def num_params(self, site: Site) -> int:
        """rank (in + out) a layer; rounds move ranks and never add any."""
        return site.num_layers * self.rank * (site.in_features + site.out_features)
