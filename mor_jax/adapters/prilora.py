"""PRILoRA (arXiv 2401.11316): ranks that grow with depth, and factors that are pruned again and again.

    r_l = r_s + (r_f - r_s) l / (L - 1), rounded to the nearest, l = 0 .. L - 1
    delta = s_l (x a) b with the first r_l ranks, s_l = alpha / r_l

Every T steps, in each column of a the share rho of the entries with the lowest |a_ij| ema_i becomes zero, where ema_i
is the running mean of the L2 norm of input feature i over the tokens of a step. Values are written, not a mask: entries
may grow again, so the parameter count is the dense one. Stacked layers are padded to the largest rank and masked.

From the paper: the linear schedule (4 to 12, which averages 8 over 12 layers), the importance, pruning of a alone.
Ours: rho 0.5, T 40, the running mean's 0.9, the scale, r_s = rank / 2 and r_f = 2 rank - r_s from one mean ``rank``, a
lone layer gets ``rank``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.diagonal import DiagonalLoRA
from mor_jax.adapters.low_rank import start_factors
from mor_jax.adapters.rules import Event, EventCall, EventResult, SiteArrays, SiteLeaves, SiteMoments


@dataclass(frozen=True)
class PruneFactors(Event):
    """Zeroes the entries of a that matter least to their rank."""

    name: ClassVar[str] = "prune"

    interval: int
    fraction: float
    decay: float

    def due(self, step: int) -> bool:
        """Every ``interval`` steps."""
        return step % self.interval == 0

    def init(self, leaves: SiteLeaves, moments: SiteMoments | None = None) -> SiteArrays:
        """{path: {"feature_norm": (layers, in)}}, zeros: a common factor of the running means changes no order."""
        return {path: {"feature_norm": jnp.zeros(own.params["a"].shape[:2])} for path, own in leaves.items()}

    def observe(self, state: SiteArrays, statistics: SiteArrays) -> SiteArrays:
        """The running mean of each feature's norm over all tokens of a step."""
        keep, new = self.decay, 1 - self.decay
        return {
            path: {"feature_norm": keep * own["feature_norm"] + new * jnp.sqrt(statistics[path]["feature_squares"])}
            for path, own in state.items()
        }

    def apply(self, call: EventCall) -> EventResult:
        """Exactly floor(fraction in) zeros a column; moments stay."""
        leaves, zeros = {}, {}
        for path, own in call.leaves.items():
            a = own.params["a"]
            importance = jnp.abs(a) * call.state[path]["feature_norm"][..., None]
            place = jnp.argsort(jnp.argsort(importance, axis=1), axis=1)
            pruned = jnp.where(place < math.floor(self.fraction * a.shape[1]), 0.0, a)
            leaves[path] = own._replace(params={**own.params, "a": pruned})
            zeros[path] = jnp.sum(pruned == 0)
        return EventResult(leaves, call.state, report={"zeros": sum(zeros.values(), jnp.zeros((), jnp.int32))})


@dataclass(frozen=True, kw_only=True)
class PRILoRA(DiagonalLoRA):
    """Pruned and rank-increasing LoRA."""

    name: ClassVar[str] = "prilora"
    title: ClassVar[str] = "PRILoRA"
    paper: ClassVar[str] = "2401.11316"
    rule_name: ClassVar[str] = "pruning"

    rank: int = 8  # mean rank over the layers
    alpha: float = 16.0  # numerator of the scale alpha / r_l
    first_rank: int = 0  # r_s, of the first layer; 0 is half of rank
    last_rank: int = 0  # r_f, of the last layer; 0 is what makes the mean rank
    prune_interval: int = 40  # T, optimiser steps
    prune_fraction: float = 0.5  # rho, of each column of a
    norm_decay: float = 0.9  # of the running mean of feature norms

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("alpha", "prune_interval")
        self.require_not_negative("first_rank", "last_rank")
        for name in ("prune_fraction", "norm_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"PRILoRA.{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def ends(self) -> tuple[int, int]:
        """(r_s, r_f)."""
        first = self.first_rank or max(1, self.rank // 2)
        return first, self.last_rank or max(first, 2 * self.rank - first)

    @property
    def width(self) -> int:
        """The largest rank."""
        return max(*self.ends, self.rank)

    def rank_of(self, site: Site, layer: Array | int) -> Array:
        """r_l, an int32 scalar, of the map with this number in the site's stack; experts of a layer have one rank."""
        depth = site.depth or site.layers
        if depth == 1:
            return jnp.int32(self.rank)
        first, last = self.ends
        place = (site.layer_of(layer) + site.first_layer) * (last - first)
        return jnp.int32(first + (2 * place + depth - 1) // (2 * (depth - 1)))

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, width) uniform, "b": (width, out) zero} and state {"mask": (width,)}, 1 for the layer's ranks."""
        mask = jnp.arange(self.width) < self.rank_of(site, layer)
        return Leaves(start_factors(key, site, self.width), {"mask": mask.astype(jnp.float32)})

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """alpha / r_l on the layer's ranks."""
        mask = leaves.state["mask"]
        return self.alpha * mask / jnp.sum(mask)

    def statistics(self, leaves: Leaves, x: Array, gates: Array | None, inputs: AdapterInputs) -> dict[str, Array]:
        """{"feature_squares": (in,)}: sums over real tokens of the squares of x: (..., in)."""
        squares = jnp.square(x.astype(jnp.float32))
        if inputs.segment_ids is not None and inputs.segment_ids.shape == x.shape[:-1]:
            squares = jnp.where(inputs.segment_ids[..., None] > 0, squares, 0.0)
        return {"feature_squares": squares.sum(tuple(range(x.ndim - 1)))}

    def rules(self, total_steps: int) -> tuple[Event, ...]:
        """The pruning."""
        return (PruneFactors(self.prune_interval, self.prune_fraction, self.norm_decay),)

    def num_params(self, site: Site) -> int:
        """The sum over layers of r_l (in + out)."""
        ranks = sum(int(self.rank_of(site, layer)) for layer in range(site.num_layers))
        return ranks * (site.in_features + site.out_features)
