"""DoRA (arXiv 2402.09353, eqs. 5 and 11; the authors' code): y = x (m * V / ||V||) with V = W + s a b.

The norm runs over ``in`` for each output and is a constant in the backward pass (section 4.3). m starts at ||W||, so
the model starts unchanged. The output changes by (m / ||V|| - 1) * x W + (m / ||V||) * s (x a) b, and the norm comes
from ||W||^2 + 2 s <W^T a, b> + s^2 b^T (a^T a) b, once a step. As in the released code and in PEFT dropout takes its
entries from x in both terms of the change, so that training with it multiplies with W twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.low_rank import LowRank, expand, start_factors
from mor_jax.adapters.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRank):
    """Weight-decomposed low-rank adaptation."""

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "2402.09353"

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank), "b": (rank, out), "m": (out,)}, float32: a uniform, b 0, m the column norms of W."""
        return Leaves({**start_factors(key, site, self.rank), "m": kernel.column_norm()})

    def input_factor(self, leaves: Leaves) -> Array:
        """a: (in, rank)."""
        return leaves.params["a"]

    @full_precision
    def prepare(self, leaves: Leaves, kernel: Kernel) -> Leaves:
        """Adds the direction's norm, (out,): ||W + s a b|| over ``in``, without forming the sum."""
        if "norm" in leaves.constants:
            return leaves
        a, b = (jax.lax.stop_gradient(leaves.params[name]) for name in ("a", "b"))
        cross = jnp.sum(jnp.einsum("...io,...ir->...ro", kernel.dense(), a) * b, axis=-2)
        gram = jnp.sum(b * (jnp.swapaxes(a, -1, -2) @ a @ b), axis=-2)
        squared = jnp.square(kernel.column_norm()) + 2 * self.scale * cross + self.scale**2 * gram
        norm = jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))
        return leaves._replace(constants={**leaves.constants, "norm": norm})

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """(m / norm - 1) * x W + (m / norm) * s (x a) b for x a: (..., rank), as (..., out)."""
        leaves = self.prepare(leaves, kernel)
        dtype = base_output.dtype
        if inputs.kept is not None:
            assert inputs.clean_x is not None
            base_output = self.drop(inputs.clean_x, inputs).astype(dtype) @ kernel.dense(dtype)
        ratio = leaves.params["m"] / leaves.constants["norm"]
        low_rank = expand(x.astype(dtype), (leaves.params["b"] * (self.scale * ratio)).astype(dtype))
        return (ratio - 1).astype(dtype) * base_output + low_rank

    def num_params(self, site: Site) -> int:
        """rank (in + out) + out a layer."""
        return super().num_params(site) + site.num_layers * site.out_features

    @full_precision
    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """m V / ||V|| with V = W + s a b, exactly."""
        direction = kernel.dense() + self.scale * leaves.params["a"] @ leaves.params["b"]
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=0))
        return kernel.replace(direction * (leaves.params["m"] / norm))

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """a follows the kernel's inputs, b and m its outputs."""
        return {**super().logical_axes(site), "m": ("out",)}
