"""LoRA-Mini (arXiv 2411.15804): each factor of LoRA is split into a frozen outer and a trained inner part.

    y = x W + s (((x A) a) b) B        A: (in, m), B: (n, out) frozen; a: (m, r), b: (r, n) trained; s = alpha / r

Only r (m + n) numbers are trained, whatever the size of the kernel: fewer than LoRA's r (in + out) on maps wider than
m + n, and more on narrower ones, of which a plan warns. A a and b B are formed once a step, so that a forward pass
costs what LoRA's does.

From the paper: the four factors and which of them are frozen ("up to 20 times fewer" trained parameters than LoRA).
Ours, since the paper's text leaves them open: A ~ N(0, 1 / in) and B ~ N(0, 1 / n), rebuilt from ``seed``, the site and
the layer and never saved; a Kaiming-uniform and b 0, so the model starts unchanged; s; m = n = 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, Site, site_id
from mor_jax.adapters.constants import constants_key, rebuildable_normal
from mor_jax.adapters.low_rank import LowRank, expand, kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class LoRAMini(LowRank):
    """LoRA with frozen outer and trained inner factors."""

    name: ClassVar[str] = "lora_mini"
    title: ClassVar[str] = "LoRA-Mini"
    paper: ClassVar[str] = "2411.15804"

    inner_in: int = 256  # m, columns of the frozen A
    inner_out: int = 256  # n, rows of the frozen B
    seed: int = 0  # of the frozen factors, apart from the run's own seed

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("inner_in", "inner_out")

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """Trained {"a": (m, rank), "b": (rank, n)}, constants {"outer_a": (in, m), "outer_b": (n, out)}, float32."""
        root = constants_key(self.seed, site_id(site.path), layer)
        keys = [jax.random.fold_in(root, i) for i in range(2)]
        outer_a = rebuildable_normal(keys[0], site.in_features**-0.5, (site.in_features, self.inner_in))
        outer_b = rebuildable_normal(keys[1], self.inner_out**-0.5, (self.inner_out, site.out_features))
        a = kaiming_uniform(key, self.inner_in, (self.inner_in, self.rank))
        b = jnp.zeros((self.rank, self.inner_out), jnp.float32)
        return Leaves({"a": a, "b": b}, {}, {"outer_a": outer_a, "outer_b": outer_b})

    def input_factor(self, leaves: Leaves) -> Array:
        """A a: (in, rank)."""
        return self._composed(leaves).params["down"]

    def prepare(self, leaves: Leaves, kernel: Kernel) -> Leaves:
        """Adds A a: (in, rank) under "down" and s b B: (rank, out) under "up"."""
        return self._composed(leaves)

    def _composed(self, leaves: Leaves) -> Leaves:
        if "down" in leaves.params:
            return leaves
        params, constants = leaves.params, leaves.constants
        down = jnp.matmul(constants["outer_a"], params["a"], precision="highest")
        up = jnp.matmul(self.scale * params["b"], constants["outer_b"], precision="highest")
        return leaves._replace(params={**params, "down": down, "up": up})

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """s (x A a) b B for x A a: (..., rank), as (..., out)."""
        dtype = base_output.dtype
        return expand(x.astype(dtype), self._composed(leaves).params["up"].astype(dtype))

    def num_params(self, site: Site) -> int:
        """rank (m + n) a layer."""
        return site.num_layers * self.rank * (self.inner_in + self.inner_out)

    def caution(self, sites: tuple[Site, ...]) -> str:
        """Where it trains more than the LoRA of its rank, which a map with in + out < m + n makes it do."""
        larger = [site for site in sites if self.inner_in + self.inner_out > site.in_features + site.out_features]
        if not larger:
            return ""
        own, lora = sum(map(self.num_params, larger)), sum(map(super().num_params, larger))
        first = larger[0]
        return (
            f"LoRA-Mini trains {own:,} parameters where LoRA of rank {self.rank} would train {lora:,}, on "
            f"{len(larger)} of {len(sites)} sites: {first.path} has {first.in_features} + {first.out_features} inputs "
            f"and outputs, fewer than inner_in + inner_out = {self.inner_in} + {self.inner_out}; choose smaller ones"
        )

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array]:
        """(A a, s b B), so that merging is exact."""
        params = self._composed(leaves).params
        return params["down"], params["up"]

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """The trained factors touch neither the kernel's inputs nor its outputs."""
        return {"a": (None, None), "b": (None, None)}
