"""LoRA with a weight for each rank: delta = ((x a) * w) b. What w is made of is all that the methods differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from mor_jax.adapters.base import Adapter, AdapterInputs, Kernel, Leaves, Site
from mor_jax.adapters.low_rank import expand


def along_ranks(leaf: str, values: Array) -> Array:
    """(..., rank) as it broadcasts to the leaf a: (..., in, rank) or b: (..., rank, out)."""
    return values[..., None, :] if leaf == "a" else values[..., :, None]


@dataclass(frozen=True, kw_only=True)
class DiagonalLoRA(Adapter):
    """Interface of methods with a: (in, width), b: (width, out) and w: (width,); they define init and rank_weights."""

    trained_weight: ClassVar[str] = ""  # name of the trained leaf (width,) that w is made of, where there is one

    rank: int = 8  # columns of a, rows of b

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("rank")

    @property
    def width(self) -> int:
        """Columns of a and rows of b as they are stored."""
        return self.rank

    def rank_weights(self, leaves: Leaves, inputs: AdapterInputs) -> Array:
        """w: (width,) float32, scale included; 0 where a rank is off."""
        raise TypeError(f"{type(self).__name__} must define rank_weights")

    def input_factor(self, leaves: Leaves) -> Array:
        """a: (in, width)."""
        return leaves.params["a"]

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """(x a) (w * b) for x a: (..., width), as (..., out); w * b is formed in float32 and rounded once."""
        dtype = base_output.dtype
        weighted = self.rank_weights(leaves, inputs)[:, None] * leaves.params["b"]
        return expand(x.astype(dtype), weighted.astype(dtype))

    def num_params(self, site: Site) -> int:
        """All of them, for methods whose layers have equal ranks."""
        return self.padded_params(site)

    def padded_params(self, site: Site) -> int:
        """width (in + out) a layer, and width more where w is trained."""
        return site.num_layers * self.width * (site.in_features + site.out_features + bool(self.trained_weight))

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(a, w * b), so that merging is exact."""
        return leaves.params["a"], self.rank_weights(leaves, AdapterInputs())[:, None] * leaves.params["b"]

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """a follows the kernel's inputs, b its outputs."""
        axes = {"a": ("in", None), "b": (None, "out")}
        return {**axes, self.trained_weight: (None,)} if self.trained_weight else axes
