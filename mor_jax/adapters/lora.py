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

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, Site, expand, kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank adaptation: s (x a) b with s = alpha / rank."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "2106.09685"

    rank: int = 8  # columns of a, rows of b
    alpha: float = 16.0  # numerator of the scale
    zero: Literal["a", "b"] = "b"  # which factor starts at zero
    learning_rate_ratio: float = 1.0  # learning rate of b over that of a (LoRA+)

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("rank", "alpha", "learning_rate_ratio")
        if self.zero not in ("a", "b"):
            raise ValueError(f"{type(self).__name__}.zero must be 'a' or 'b', got {self.zero!r}")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    @property
    def learning_rate_ratios(self) -> dict[str, float]:
        """For the group of b; none where it learns like a."""
        return {} if self.learning_rate_ratio == 1 else {"b": self.learning_rate_ratio}

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank), "b": (rank, out)}, float32, one of them uniform in its fan-in and the other 0."""
        a = jnp.zeros((site.in_features, self.rank), jnp.float32)
        b = jnp.zeros((self.rank, site.out_features), jnp.float32)
        if self.zero == "b":
            a = kaiming_uniform(key, site.in_features, a.shape)
        else:
            b = kaiming_uniform(key, self.rank, b.shape)
        return Leaves({"a": a, "b": b})

    def input_factor(self, leaves: Leaves) -> Array:
        """a: (in, rank)."""
        return leaves.params["a"]

    def delta(
        self,
        leaves: Leaves,
        x: Array,
        base_output: Array,
        kernel: Kernel,
        gates: Array | None,
        inputs: AdapterInputs,
    ) -> Array:
        """s (x a) b for x a: (..., rank), as (..., out)."""
        dtype = base_output.dtype
        return expand(x.astype(dtype), (leaves.params["b"] * self.scale).astype(dtype))

    def num_params(self, site: Site) -> int:
        """rank (in + out) a layer."""
        return site.num_layers * self.rank * (site.in_features + site.out_features)

    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """W + s a b, exactly."""
        return kernel.replace(kernel.dense() + self.scale * leaves.params["a"] @ leaves.params["b"])

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """a follows the kernel's inputs, b its outputs."""
        return {"a": ("in", None), "b": (None, "out")}


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
