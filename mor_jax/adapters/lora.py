"""LoRA (arXiv 2106.09685, eq. 3) and rsLoRA (arXiv 2312.03732): y = x W + s (x a) b.

s = alpha / rank for LoRA and alpha / sqrt(rank) for rsLoRA. One factor starts at zero, so the model starts unchanged:
b by default (the paper); ``zero="a"`` is our option, for runs that should differ less between device orders.
LoRA+ (arXiv 2402.12354) is ``learning_rate_ratio``: b learns faster than a, 16 times in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.low_rank import LowRank, expand, kaiming_uniform, start_factors


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Low-rank adaptation: s (x a) b with s = alpha / rank."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "2106.09685"

    zero: Literal["a", "b"] = "b"  # which factor starts at zero
    learning_rate_ratio: float = 1.0  # learning rate of b over that of a (LoRA+)

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("learning_rate_ratio")
        if self.zero not in ("a", "b"):
            raise ValueError(f"{type(self).__name__}.zero must be 'a' or 'b', got {self.zero!r}")

    @property
    def learning_rate_ratios(self) -> dict[str, float]:
        """For the group of b; none where it learns like a."""
        return {} if self.learning_rate_ratio == 1 else {"b": self.learning_rate_ratio}

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank), "b": (rank, out)}, float32, one of them uniform in its fan-in and the other 0."""
        params = start_factors(key, site, self.rank)
        if self.zero == "a":
            b = kaiming_uniform(key, self.rank, params["b"].shape)
            params = {"a": jnp.zeros_like(params["a"]), "b": b}
        return Leaves(params)

    def input_factor(self, leaves: Leaves) -> Array:
        """a: (in, rank)."""
        return leaves.params["a"]

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """s (x a) b for x a: (..., rank), as (..., out)."""
        dtype = base_output.dtype
        return expand(x.astype(dtype), (leaves.params["b"] * self.scale).astype(dtype))

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(a, s b), so that merging is exact."""
        return leaves.params["a"], self.scale * leaves.params["b"]


@dataclass(frozen=True, kw_only=True)
class RsLoRA(LoRA):
    """Rank-stabilised LoRA: s = alpha / sqrt(rank)."""

    name: ClassVar[str] = "rslora"
    title: ClassVar[str] = "rsLoRA"
    paper: ClassVar[str] = "2312.03732"

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank**0.5
