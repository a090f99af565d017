"""VeRA (arXiv 2310.11454, eq. 2; PEFT's code): random factors shared by the whole model, two trained vectors a site.

    y = x W + ((x a) * d) b * lam_b        a: (in, r), b: (r, out) frozen; d: (r,), lam_b: (out,) trained

a and b are drawn once a model, as large as its largest site needs, and every site reads the upper left part that fits:
a[:in], b[:, :out]. They are rebuilt from ``seed`` and never saved, so a site costs r + out numbers instead of
r (in + out), and the rank can be large. There is no alpha; d starts at 0.1 and lam_b at 0, so the model starts
unchanged.

From the paper: equation, both starts, rank 256 (its RoBERTa runs). From the released code: a and b Kaiming-uniform with
gain sqrt(2) over the fan-in of the largest shape, that is U(-sqrt(6 / fan), sqrt(6 / fan)). Ours: ``seed``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.constants import constants_key, rebuildable_uniform
from mor_jax.adapters.low_rank import expand


@jax.custom_jvp
def merged_product(x: Array, kernel: Array, a: Array, b: Array, d: Array, lam_b: Array) -> Array:
    """x (W + (a * d) b * lam_b), (..., out), for the shared a and b before they are cut to the site.

    The gradients of d and lam_b both come from (x a)^T g: (r, out), where jax's own rule would form x^T g: (in, out).
    a and b are cut here, so that x a is one product for all sites that read x: cut before, they would be other arrays.
    """
    return jnp.matmul(x, _merged(kernel, a, b, d, lam_b))


def _merged(kernel: Array, a: Array, b: Array, d: Array, lam_b: Array) -> Array:
    a, b = _cut(a, b, kernel.shape)
    return kernel + (a * d) @ (b * lam_b)


def _cut(a: Array, b: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    return a[: shape[0]], b[:, : shape[1]]


def _product_tangent(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """The product and its tangent, whose parts for arrays that stand still are left out."""
    x, kernel, shared_a, shared_b, d, lam_b = primals
    merged = _merged(kernel, shared_a, shared_b, d, lam_b)
    x_dot, kernel_dot, a_dot, b_dot, d_dot, lam_dot = (None if type(t) is SymbolicZero else t for t in tangents)
    y = jnp.matmul(x, merged)
    parts = []
    if x_dot is not None:
        parts.append(jnp.matmul(x_dot, merged))
    if d_dot is not None or lam_dot is not None:
        parts.append(_through_shared(x, shared_a, shared_b, d, lam_b, d_dot, lam_dot, kernel.shape))
    if kernel_dot is not None or a_dot is not None or b_dot is not None:
        given = zip(primals[1:4], (kernel_dot, a_dot, b_dot), strict=True)
        frozen_dot = tuple(jnp.zeros_like(p) if t is None else t for p, t in given)
        _, merged_dot = jax.jvp(lambda w, a, b: _merged(w, a, b, d, lam_b), primals[1:4], frozen_dot)
        parts.append(jnp.matmul(x, merged_dot))
    change = sum(parts[1:], parts[0])
    # Along axes of explicit type a sum is split as the finer of its terms is, and the tangent as y is.
    return y, change if jax.typeof(change) == jax.typeof(y) else change + jnp.zeros_like(y)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=7)
def _through_shared(
    x: Array,
    a: Array,
    b: Array,
    d: Array,
    lam_b: Array,
    d_dot: Array | None,
    lam_dot: Array | None,
    shape: tuple[int, int],
) -> Array:
    """x a (d' b * lam_b + d b * lam_b'), (..., out), of the vectors that move.

    Nothing in here is kept: the backward pass cuts a and b and forms x a again, once for all sites that read x.
    """
    a, b = _cut(a, b, shape)
    weights = [p[:, None] * b * q for p, q in ((d_dot, lam_b), (d, lam_dot)) if p is not None and q is not None]
    return expand(jnp.matmul(x, a), sum(weights[1:], weights[0]))


merged_product.defjvp(_product_tangent, symbolic_zeros=True)


@dataclass(frozen=True, kw_only=True)
class VeRA(Adapter):
    """Vector-based random matrix adaptation."""

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "2310.11454"

    rank: int = 256  # columns of a, rows of b
    d_initial: float = 0.1  # every entry of d at the start
    seed: int = 0  # of the shared factors, apart from the run's own seed

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("rank", "d_initial")

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"d": (rank,), "lam_b": (out,)}, float32: d_initial and 0."""
        d = jnp.full((self.rank,), self.d_initial, jnp.float32)
        return Leaves({"d": d, "lam_b": jnp.zeros((site.out_features,), jnp.float32)})

    def shared(self, key: Array, sites: tuple[Site, ...]) -> Leaves:
        """Constants {"a": (largest in, rank), "b": (rank, largest out)}, float32, from ``seed`` alone."""
        rows, columns = max(s.in_features for s in sites), max(s.out_features for s in sites)
        a = rebuildable_uniform(constants_key(self.seed, 0), (6 / rows) ** 0.5, (rows, self.rank))
        b = rebuildable_uniform(constants_key(self.seed, 1), (6 / self.rank) ** 0.5, (self.rank, columns))
        return Leaves({}, {}, {"a": a, "b": b})

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """((x a) * d) b * lam_b for x: (..., in), as (..., out)."""
        a, b = _cut(leaves.constants["a"], leaves.constants["b"], kernel.shape)
        dtype = base_output.dtype
        hidden = jnp.matmul(x, a.astype(x.dtype), preferred_element_type=jnp.float32) * leaves.params["d"]
        return (hidden.astype(dtype) @ b.astype(dtype)) * leaves.params["lam_b"].astype(dtype)

    def output(self, leaves: Leaves, x: Array, kernel: Kernel, inputs: AdapterInputs) -> Array | None:
        """x (W + (a * d) b * lam_b), for float32 x: (..., in) of more than in out / (in + out) tokens.

        With that many tokens forming the sum is less work than a pass of all tokens through a and b, and the sum takes
        less memory than x and y. In a narrower dtype it would lose what is below half a unit in the last place of W.
        """
        (rows, columns), tokens = kernel.shape, x.size // x.shape[-1]
        if x.dtype != jnp.float32 or tokens * (rows + columns) <= rows * columns:
            return None
        a, b = leaves.constants["a"], leaves.constants["b"]
        return merged_product(x, kernel.dense(), a, b, leaves.params["d"], leaves.params["lam_b"])

    def num_params(self, site: Site) -> int:
        """Rank + out a layer."""
        return site.num_layers * (self.rank + site.out_features)

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(a * d, b * lam_b), so that merging is exact."""
        a, b = _cut(leaves.constants["a"], leaves.constants["b"], kernel.shape)
        return a * leaves.params["d"], b * leaves.params["lam_b"]

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """lam_b follows the kernel's outputs."""
        return {"d": (None,), "lam_b": ("out",)}
