"""DyLoRA (arXiv 2210.07558, section 4; the authors' code): one LoRA that works at every rank up to its own.

    k ~ U{1..r}, one draw for all sites and each optimiser step
    delta = (alpha / k) (x a[:, :k]) b[:k]

In mode ``frozen`` (the released code's) only rank k learns in its step: column k of a and row k of b, so rank k learns
to add to the k - 1 before it. Gradient *and* update of all others are masked, because moments and weight decay would
move them otherwise. In mode ``train_prefix`` all of the first k learn. Without a draw (evaluation, merging) all r are
used; ``at_rank`` cuts a trained adapter to the LoRA of any smaller rank.

From the paper: the uniform draw, nested ranks, both modes. Ours: the masked moments and decay, rank 8, alpha 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.diagonal import DiagonalLoRA, along_ranks
from mor_jax.adapters.lora import LoRA
from mor_jax.adapters.low_rank import start_factors
from mor_jax.adapters.rules import UpdateTransform


@dataclass(frozen=True)
class DrawnRanksOnly(UpdateTransform):
    """Lets rank k alone learn, or the first k; a has ranks on its last axis, b on the last but one."""

    scalars: ClassVar[tuple[str, ...]] = ("rank",)

    prefix: bool = False  # all of the first k learn

    def _mask(self, leaf: str, value: Array, scalars: Mapping[str, Array]) -> Array:
        if leaf not in ("a", "b"):
            return value
        size = value.shape[-1 if leaf == "a" else -2]
        drawn = jnp.minimum(scalars["rank"], size)
        index = jnp.arange(1, size + 1)
        learns = index <= drawn if self.prefix else index == drawn
        return jnp.where(along_ranks(leaf, learns), value, jnp.zeros_like(value))

    def gradient(self, leaf: str, gradient: Array, scalars: Mapping[str, Array]) -> Array:
        """The gradient of the ranks that learn, 0 elsewhere."""
        return self._mask(leaf, gradient, scalars)

    def update(self, leaf: str, update: Array, scalars: Mapping[str, Array]) -> Array:
        """The update of the ranks that learn, exactly 0 elsewhere."""
        return self._mask(leaf, update, scalars)


@dataclass(frozen=True, kw_only=True)
class DyLoRA(DiagonalLoRA):
    """Dynamic-rank LoRA."""

    name: ClassVar[str] = "dylora"
    title: ClassVar[str] = "DyLoRA"
    paper: ClassVar[str] = "2210.07558"
    rule_name: ClassVar[str] = "rank draw"

    rank: int = 8  # the largest rank
    alpha: float = 16.0  # numerator of the scale alpha / k
    mode: Literal["frozen", "train_prefix"] = "frozen"  # rank k alone learns, or all of the first k

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("alpha")
        if self.mode not in ("frozen", "train_prefix"):
            raise ValueError(f"DyLoRA.mode must be 'frozen' or 'train_prefix', got {self.mode!r}")

    @property
    def largest_drawn_rank(self) -> int:
        """r."""
        return self.rank

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank) uniform, "b": (rank, out) zero}, float32."""
        return Leaves(start_factors(key, site, self.rank))

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """alpha / k for the first k = ``inputs.rank`` ranks (all where no rank is given), 0 for the rest."""
        k = jnp.asarray(self.rank if inputs.rank is None else jnp.minimum(inputs.rank, self.rank), jnp.float32)
        return jnp.where(jnp.arange(self.rank) < k, self.alpha / k, 0.0)

    def rules(self, total_steps: int) -> tuple[UpdateTransform, ...]:
        """The mask of each step's draw."""
        return (DrawnRanksOnly(prefix=self.mode == "train_prefix"),)

    def at_rank(self, leaves: Leaves, rank: int) -> tuple[Adapter, Leaves]:
        """The LoRA of the first ``rank`` ranks, which computes what the forward pass does when it draws that rank."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must be between 1 and the trained rank {self.rank}, got {rank}")
        params = {"a": leaves.params["a"][..., :rank], "b": leaves.params["b"][..., :rank, :]}
        return LoRA(rank=rank, alpha=self.alpha, dropout=self.dropout), Leaves(params)
