"""HaLoRA (arXiv 2502.19747): LoRA trained to stand the noise of analogue hardware that will hold the base weights.

    training    y = x (W + nu) + s (x a) b,   nu ~ N(0, sigma^2) for each weight
    loss        + mu (||a^T a|| + ||b b^T||)

The base sits on noisy memory and the adapter on exact memory, so the forward pass of training draws a noisy base. One
draw is held for ``noise_steps`` optimiser steps: its key is folded from ``seed``, site, layer and
``noise_step // noise_steps``, so nothing is stored and all micro-batches of a step see the same base. Without
``AdapterInputs.noise_step`` the base is clean and the method is LoRA.

From the paper: the objective, sigma = 0.01, 400 steps a draw, mu = 0.1, rank 4 on q, k, v, up and down; the model is
evaluated at sigma 0.005, 0.01 and 0.02. Ours: the norm as an option (``spectral`` or ``frobenius``), its mean over
sites and layers, the unit ``tile_max`` (sigma times the largest |W| of each 64 x 64 tile), that dropout spares x nu,
and that merging must be asked for: it is exact, but moves the adapter onto the noisy memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, NotMergeable, Site, site_id
from mor_jax.adapters.constants import constants_key
from mor_jax.adapters.low_rank import LowRank, expand, start_factors

TILE = 64


@dataclass(frozen=True, kw_only=True)
class HaLoRA(LowRank):
    """Hardware-aware low-rank adaptation."""

    name: ClassVar[str] = "halora"
    title: ClassVar[str] = "HaLoRA"
    training_inputs: ClassVar[tuple[str, ...]] = ("noise_step",)
    paper: ClassVar[str] = "2502.19747"

    rank: int = 4  # columns of a, rows of b
    alpha: float = 8.0  # numerator of the scale s = alpha / rank
    sigma: float = 0.01  # standard deviation of the noise, in its unit
    noise_unit: Literal["absolute", "tile_max"] = "absolute"  # tile_max: the largest |W| of a 64 x 64 tile
    noise_steps: int = 400  # optimiser steps that see one draw
    penalty_weight: float = 0.1  # mu
    norm: Literal["spectral", "frobenius"] = "spectral"  # of the Gram matrices in the penalty
    mergeable: bool = False  # whether merging the adapter into the (noisy) base is allowed
    seed: int = 0  # of the noise, apart from the run's own seed

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("noise_steps")
        self.require_not_negative("sigma", "penalty_weight")
        self.require_choice("noise_unit", "absolute", "tile_max")
        self.require_choice("norm", "spectral", "frobenius")

    @property
    def rule(self) -> str:
        """A new draw of the base's noise every so many steps."""
        return "noise" if self.sigma else ""

    @property
    def merge_condition(self) -> str:
        """Merging must be asked for."""
        return "" if self.mergeable else "mergeable=true"

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, rank), "b": (rank, out)}, a uniform and b 0; constant {"place": (2,) int32}, site and layer."""
        place = jnp.stack([jnp.int32(site_id(site.path)), jnp.asarray(layer + site.first_layer, jnp.int32)])
        return Leaves(start_factors(key, site, self.rank), {}, {"place": place})

    def noise(self, leaves: Leaves, kernel: Kernel, step: Array) -> Array:
        """nu: (in, out) float32, the same for all steps of one epoch of ``noise_steps``."""
        place = leaves.constants["place"]
        key = constants_key(self.seed, place[0], place[1], jnp.asarray(step) // self.noise_steps)
        noise = self.sigma * jax.random.normal(key, kernel.shape, jnp.float32)
        return noise * tile_max(kernel.dense()) if self.noise_unit == "tile_max" else noise

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """s (x a) b, and x nu while ``inputs.noise_step`` is given, for x: (..., in), as (..., out).

        The noise is the base's, so it meets x before dropout.
        """
        dtype = base_output.dtype
        hidden = jnp.matmul(x, leaves.params["a"].astype(x.dtype), preferred_element_type=jnp.float32)
        change = expand(hidden.astype(dtype), (leaves.params["b"] * self.scale).astype(dtype))
        if inputs.noise_step is None or not self.sigma:
            return change
        clean = x if inputs.clean_x is None else inputs.clean_x
        return change + clean.astype(dtype) @ self.noise(leaves, kernel, inputs.noise_step).astype(dtype)

    def output(self, leaves: Leaves, x: Array, kernel: Kernel, inputs: AdapterInputs) -> Array | None:
        """x (W + nu) + s (x a) b while ``inputs.noise_step`` is given: one product with the kernel instead of two."""
        if inputs.noise_step is None or not self.sigma:
            return None
        noisy = kernel.dense() + self.noise(leaves, kernel, inputs.noise_step)
        y = x @ noisy.astype(x.dtype)
        return y + self.delta(leaves, x, y, kernel, None, AdapterInputs())

    def penalty(self, leaves: Leaves) -> Array | None:
        """mu (||a^T a|| + ||b b^T||) of one layer, float32; its gradient at b = 0 is 0."""
        if not self.penalty_weight:
            return None
        a, b = leaves.params["a"], leaves.params["b"]
        norm = spectral_norm if self.norm == "spectral" else frobenius_norm
        return self.penalty_weight * (norm(a.T @ a) + norm(b @ b.T))

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(a, s b): all that is kept beside the noisy base."""
        return leaves.params["a"], self.scale * leaves.params["b"]

    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """W + s a b, exactly.

        Raises:
            NotMergeable: unless ``mergeable`` is set.
        """
        if not self.mergeable:
            raise NotMergeable(
                "HaLoRA keeps its adapter off the noisy memory that holds the base; serve the adapter beside it, "
                "or merge all the same with mergeable=True (--mergeable)"
            )
        return super().merge(leaves, kernel, gates)


def tile_max(kernel: Array) -> Array:
    """The largest absolute value of each entry's 64 x 64 tile, (in, out); tiles at the edges are smaller."""
    rows, columns = kernel.shape
    padded = jnp.pad(jnp.abs(kernel), ((0, -rows % TILE), (0, -columns % TILE)))
    tiles = padded.reshape(padded.shape[0] // TILE, TILE, -1, TILE).max(axis=(1, 3))
    return jnp.repeat(jnp.repeat(tiles, TILE, axis=0), TILE, axis=1)[:rows, :columns]


def spectral_norm(gram: Array) -> Array:
    """The largest eigenvalue of a positive semi-definite matrix.

    As v^T G v with v the top eigenvector, held constant: the gradient is v v^T, which is the true one, and finite where
    eigenvalues coincide (all of them do at b = 0, where the eigendecomposition's own gradient is NaN).
    """
    _, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(gram))
    top = vectors[:, -1]
    return top @ gram @ top


def frobenius_norm(matrix: Array) -> Array:
    """The root of the sum of squares, with gradient 0 at the zero matrix instead of NaN."""
    total = jnp.sum(jnp.square(matrix))
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)
