"""What methods with two thin factors share: a: (in, r), b: (r, out), their start, count and sharding, s = alpha / r."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import Adapter, Kernel, Leaves, Site


def kaiming_uniform(key: Array, fan_in: int, shape: tuple[int, ...]) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32: Kaiming's uniform with a = sqrt(5)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@jax.custom_vjp
def expand(z: Array, b: Array) -> Array:
    """``z @ b`` for a narrow z: (..., r) and b: (r, out), as (..., out) in their dtype.

    The gradient of b is ``z.T @ g``. jax's own rule forms ``(g.T @ z).T``, for which XLA on CPU writes out the
    transpose of the wide cotangent g: an eighth of a LoRA step at width 512.
    """
    return jnp.matmul(z, b)


def _expand_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    z, b = kept
    tokens = tuple(range(z.ndim - 1))
    by_z = jax.lax.dot_general(g, b, (((g.ndim - 1,), (1,)), ((), ())))
    return by_z, jax.lax.dot_general(z, g, ((tokens, tokens), ((), ())))


expand.defvjp(lambda z, b: (jnp.matmul(z, b), (z, b)), _expand_backward)


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
