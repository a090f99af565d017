"""MELoRA (arXiv 2402.17263, eq. 3; the authors' code): n small LoRAs side by side, each on its own slice of x and y.

    y = x W + concat_i s (x_i a_i) b_i        a_i: (in / n, r), b_i: (r, out / n), s = alpha / r

The change is block diagonal, so n mini LoRAs of rank r reach rank n r with the r (in + out) parameters of *one* LoRA of
rank r. n = 1 is LoRA. It is computed as the LoRA of rank n r that it is, with a and b laid out block diagonally once a
step: x is read once, beside its other readers, where a matmul for each slice would copy x and y in pieces.

From the paper and its code: all of the above, a uniform in the fan-in in / n, b 0, so the model starts unchanged. Ours:
the defaults n = 2, r = 8, alpha = 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.low_rank import LowRank, expand, kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class MELoRA(LowRank):
    """Mini-ensemble of low-rank adapters."""

    name: ClassVar[str] = "melora"
    title: ClassVar[str] = "MELoRA"
    paper: ClassVar[str] = "2402.17263"

    rank: int = 8  # of each mini LoRA
    num_minis: int = 2  # n, which divides in and out of every site

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("num_minis")

    def _slices(self, site: Site) -> tuple[int, int]:
        """(in / n, out / n).

        Raises:
            ValueError: if n does not divide them.
        """
        for name, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            if size % self.num_minis:
                raise ValueError(
                    f"{site.path}: MELoRA.num_minis = {self.num_minis} does not divide {name} = {size}; "
                    "choose a divisor of both, or leave the site out of the targets"
                )
        return site.in_features // self.num_minis, site.out_features // self.num_minis

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (n, in / n, rank), "b": (n, rank, out / n)}, float32, a uniform in its fan-in in / n and b 0.

        Raises:
            ValueError: if n does not divide in and out.
        """
        rows, columns = self._slices(site)
        a = kaiming_uniform(key, rows, (self.num_minis, rows, self.rank))
        return Leaves({"a": a, "b": jnp.zeros((self.num_minis, self.rank, columns), jnp.float32)})

    def input_factor(self, leaves: Leaves) -> Array:
        """a block diagonally: (in, n rank)."""
        return self.prepare(leaves).params["down"]

    def prepare(self, leaves: Leaves, kernel: Kernel | None = None) -> Leaves:
        """Adds a and s b block diagonally: "down": (in, n rank) and "up": (n rank, out)."""
        if "down" in leaves.params:
            return leaves
        down, up = block_diagonal(leaves.params["a"]), block_diagonal(self.scale * leaves.params["b"])
        return leaves._replace(params={**leaves.params, "down": down, "up": up})

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """concat_i s (x_i a_i) b_i for x "down": (..., n rank), as (..., out)."""
        dtype = base_output.dtype
        return expand(x.astype(dtype), self.prepare(leaves).params["up"].astype(dtype))

    def num_params(self, site: Site) -> int:
        """rank (in + out) a layer, whatever n.

        Raises:
            ValueError: if n does not divide in and out.
        """
        rows, columns = self._slices(site)
        return site.num_layers * self.num_minis * self.rank * (rows + columns)

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(in, n r) and (n r, out): the block-diagonal matrices of the a_i and of the s b_i; merging is exact."""
        return block_diagonal(leaves.params["a"]), block_diagonal(self.scale * leaves.params["b"])

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """The slices of in and out are cut by mini LoRA, so no axis follows the kernel's."""
        return {"a": (None, None, None), "b": (None, None, None)}


def block_diagonal(blocks: Array) -> Array:
    """(..., n, rows, columns) as (..., n rows, n columns), 0 outside of the blocks."""
    count, rows, columns = blocks.shape[-3:]
    apart = blocks[..., :, :, None, :] * jnp.eye(count, dtype=blocks.dtype)[:, None, :, None]
    return apart.reshape(*blocks.shape[:-3], count * rows, count * columns)
