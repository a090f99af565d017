"""BeamLoRA (arXiv 2502.13604; the authors' code): ranks weigh themselves, weak ones become copies of strong ones.

    p = r softmax(gamma / tau), gamma 0 at the start and trained like a and b;  delta = s ((x a) * p) b, s = alpha / r

Every T steps, while T steps are left: all p of all sites are sorted, strongest first, and ranks from the one on with
which their sum exceeds the share t(step) are pruned, t(step) = 1 - (1 - P0)(1 + cos(pi step / E)) / 2, 1 after E. In a
site with K pruned ranks its K strongest, randomly paired with them, donate their column of a and row of b as they were
T / 2 steps ago; both gammas of a pair become their mean, and the moments of all gammas are set to 0. So p sums to r
always, and the start is exactly LoRA's.

From the code: tau 0.05, and 0.03 below a learning rate of 1e-4; P0 0.95, E = 2/3 of the steps, the history of T / 2,
that the rank which crosses the share goes too. The code means to give a copied rank its donor's moments of T / 2 steps
ago as well, but writes them to a temporary: they are really copied here. Ours: T = 1/12 of the steps; at most r // 2
ranks of a site go, the weakest, so that none is pruned and a donor at once (the code has this limit in other modes
alone); t(step) and the history are of the step itself, where the code's counters are one step off.
A single rank has no other to be weighed against: ``rank`` is at least 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.diagonal import DiagonalLoRA, along_ranks
from mor_jax.adapters.low_rank import start_factors
from mor_jax.adapters.rules import Event, EventCall, EventResult, SiteLeaves, SiteMoments, split_sites, stack_sites

FACTORS = ("a", "b")


def pruned_counts(weights: Array, threshold: Array) -> Array:
    """K of each site, (sites,) int32, for p: (sites, rank): the ranks that with all stronger ones exceed the share."""
    flat = weights.ravel()
    order = jnp.argsort(-flat)
    # A sum of everything may exceed the whole by rounding, hence the second condition.
    pruned = (jnp.cumsum(flat[order]) > threshold * weights.size) & (threshold < 1)
    lost = jnp.zeros(flat.size, jnp.int32).at[order].set(pruned.astype(jnp.int32)).reshape(weights.shape)
    return jnp.minimum(lost.sum(1), weights.shape[1] // 2)


def pair_ranks(key: Array, weights: Array, count: Array) -> tuple[Array, Array]:
    """(source, partner) of each rank of one site, both (rank,) int32 and a rank's own index where it is in no pair.

    The ``count`` weakest ranks are paired with the ``count`` strongest at random; source is the donor of a weak rank,
    partner the other one of a pair.
    """
    rank = weights.shape[0]
    place = jnp.arange(rank)
    strongest = jnp.argsort(-weights)
    weakest = jnp.flip(strongest)
    paired = place < count
    drawn = jnp.argsort(jnp.where(paired, jax.random.uniform(key, (rank,)), 2.0))  # shuffles the first ``count``
    donor = strongest[drawn]
    source = place.at[weakest].set(jnp.where(paired, donor, weakest))
    partner = source.at[jnp.where(paired, donor, rank)].set(weakest, mode="drop")
    return source, partner


def copy_ranks(leaf: str, value: Array, source: Array, old: Array) -> Array:
    """a: (layers, in, rank) or b: (layers, rank, out) with the ranks that have a source copied from ``old``."""
    copied = along_ranks(leaf, source != jnp.arange(source.shape[1]))
    return jnp.where(copied, jnp.take_along_axis(old, along_ranks(leaf, source), -1 if leaf == "a" else -2), value)


@dataclass(frozen=True)
class ExpandStrong(Event):
    """Remembers the factors and their moments T / 2 steps before each move, then moves."""

    name: ClassVar[str] = "expand"
    remembers_moments: ClassVar[bool] = True

    interval: int  # T
    total_steps: int
    rank: int
    temperature: float
    first_share: float  # P0
    end: float  # E, steps

    def moves(self, step: int) -> bool:
        """Whether ranks are moved after ``step``; otherwise a due step only remembers."""
        return step > 0 and step % self.interval == 0 and self.total_steps - step >= self.interval

    def due(self, step: int) -> bool:
        """Every interval, and half of one before each."""
        return self.moves(step) or self.moves(step + self.interval // 2)

    def threshold(self, step: Array | float) -> Array:
        """t(step)."""
        share = jnp.minimum(jnp.asarray(step, jnp.float32) / self.end, 1.0)
        return 1 - (1 - self.first_share) * (1 + jnp.cos(math.pi * share)) / 2

    def init(self, leaves: SiteLeaves, moments: SiteMoments | None = None) -> dict[str, dict[str, Any]]:
        """{path: {"a", "b"[, "moments": {"0": {"a", "b"}, …}]}}: what is remembered."""
        return {path: _remembered(own, (moments or {}).get(path)) for path, own in leaves.items()}

    def apply(self, call: EventCall) -> EventResult:
        """Remembers or moves, by the step."""
        move = call.step % self.interval == 0
        gammas = stack_sites({path: own.params["gamma"] for path, own in call.leaves.items()})
        weights = self.rank * jax.nn.softmax(gammas / self.temperature, axis=-1)
        counts = jnp.where(move, pruned_counts(weights, self.threshold(call.step)), 0)
        pairs = jax.vmap(pair_ranks)(jax.random.split(call.key, len(weights)), weights, counts)
        sources, partners = (split_sites(each, call.leaves) for each in pairs)
        leaves, state = {}, {}
        for path, own in call.leaves.items():
            partner, kept, gamma = partners[path], call.state[path], own.params["gamma"]
            params = {leaf: copy_ranks(leaf, own.params[leaf], sources[path], kept[leaf]) for leaf in FACTORS}
            mean = (gamma + jnp.take_along_axis(gamma, partner, 1)) / 2
            params["gamma"] = jnp.where(partner == jnp.arange(self.rank), gamma, mean)
            leaves[path] = own._replace(params=params)
            now = _remembered(own, call.moments.get(path) if "moments" in kept else None)
            state[path] = jax.tree.map(lambda old, new: jnp.where(move, old, new), kept, now)

        def moments(path: str, leaf: str, number: int, moment: Array) -> Array:
            if leaf == "gamma":
                return jnp.where(move, jnp.zeros_like(moment), moment)
            old = call.state[path].get("moments", {}).get(str(number), {leaf: moment})[leaf]
            return copy_ranks(leaf, moment, sources[path], old)

        return EventResult(leaves, state, moments, {"moved": counts.sum()})


def _remembered(own: Leaves, moments: dict[str, tuple[Array, ...]] | None) -> dict[str, Any]:
    """The factors of a site, and their moments by number where the optimiser has some and they are kept."""
    kept: dict[str, Any] = {leaf: own.params[leaf] for leaf in FACTORS}
    numbered: dict[str, dict[str, Array]] = {}
    for leaf in FACTORS:
        for number, moment in enumerate((moments or {}).get(leaf, ())):
            numbered.setdefault(str(number), {})[leaf] = moment
    return {**kept, "moments": numbered} if numbered else kept


@dataclass(frozen=True, kw_only=True)
class BeamLoRA(DiagonalLoRA):
    """Beam search over ranks."""

    name: ClassVar[str] = "beamlora"
    title: ClassVar[str] = "BeamLoRA"
    paper: ClassVar[str] = "2502.13604"
    rule_name: ClassVar[str] = "expansion"
    trained_weight: ClassVar[str] = "gamma"

    alpha: float = 16.0  # numerator of the scale s = alpha / rank
    temperature: float = 0.05  # tau; runs with a learning rate below 1e-4 take 0.03 unless told otherwise
    interval: int = 0  # T, steps between moves; 0 is a twelfth of the run
    first_share: float = 0.95  # P0, of the sum of p that is kept at the start
    end_fraction: float = 2 / 3  # E, of the steps, after which nothing is pruned

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        if self.rank < 2:
            raise ValueError(
                "BeamLoRA.rank must be at least 2, got 1: a single rank has nothing to be weighed against, and its "
                "weight would never learn; choose method lora for rank 1"
            )
        self.require_positive("alpha", "temperature")
        if self.interval < 0 or self.interval == 1:
            raise ValueError(f"BeamLoRA.interval must be 0 or at least 2, got {self.interval}")
        for name in ("first_share", "end_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"BeamLoRA.{name} must be in (0, 1], got {getattr(self, name)}")

    @classmethod
    def defaults_at(cls, learning_rate: float) -> dict[str, float]:
        """tau 0.03 below a learning rate of 1e-4 (the released code's comment)."""
        return {"temperature": 0.03} if learning_rate < 1e-4 else {}

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank) uniform, "b": (rank, out) zero, "gamma": (rank,) zero}, float32."""
        return Leaves({**start_factors(key, site, self.rank), "gamma": jnp.zeros(self.rank, jnp.float32)})

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """s p, which sums to alpha."""
        return self.alpha * jax.nn.softmax(leaves.params["gamma"] / self.temperature)

    def rules(self, total_steps: int) -> tuple[Event, ...]:
        """The history and the moves."""
        interval = self.interval or max(2, round(total_steps / 12))
        end = self.end_fraction * total_steps
        return (ExpandStrong(interval, total_steps, self.rank, self.temperature, self.first_share, end),)
