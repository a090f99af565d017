"""What methods with two thin factors share: a: (in, r), b: (r, out), their start, count and sharding, s = alpha / r."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import Adapter, Kernel, Leaves, Site, kaiming_uniform


def start_factors(key: Array, site: Site, rank: int) -> dict[str, Array]:
    """{"a": (in, rank), "b": (rank, out)}, float32, a uniform in its fan-in and b 0."""
    a = kaiming_uniform(key, site.in_features, (site.in_features, rank))
    return {"a": a, "b": jnp.zeros((rank, site.out_features), jnp.float32)}


@dataclass(frozen=True, kw_only=True)
class LowRank(Adapter):
    """Interface of methods whose trained leaves are a, b and perhaps more; they define delta and merge."""

    rank: int = 8  # columns of a, rows of b
    alpha: float = 16.0  # numerator of the scale s = alpha / rank

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("rank", "alpha")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank), "b": (rank, out)}, float32, a uniform and b 0."""
        return Leaves(start_factors(key, site, self.rank))

    def num_params(self, site: Site) -> int:
        """rank (in + out) a layer."""
        return site.num_layers * self.rank * (site.in_features + site.out_features)

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """a follows the kernel's inputs, b its outputs."""
        return {"a": ("in", None), "b": (None, "out")}
