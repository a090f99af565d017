"""What methods with two thin factors share: a: (in, r), b: (r, out), their start, count and sharding, s = alpha / r."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from mor_jax.adapters.base import Adapter, Kernel, Leaves, Site


def kaiming_uniform(key: Array, fan_in: int, shape: tuple[int, ...]) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32: Kaiming's uniform with a = sqrt(5)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def expand(z: Array, b: Array) -> Array:
    """``z @ b`` for a narrow z: (..., r) and b: (r, out), as (..., out) in their dtype.

    The gradient of b is ``(g.T @ z).T`` for jax. With the tokens in one axis XLA makes ``z.T @ g`` of it; with several
    it writes out the transpose of the wide cotangent g on CPU: an eighth of a LoRA step at width 512. The tokens of a
    mesh's devices stay in their axes, each of which may be split.
    """
    if z.ndim <= 2 or _split_by_mesh():
        return jnp.matmul(z, b)
    return jnp.matmul(z.reshape(-1, z.shape[-1]), b).reshape(*z.shape[:-1], b.shape[-1])


def _split_by_mesh() -> bool:
    """Whether an array here may be spread over devices: a mesh is in use, and this is no program of one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


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
