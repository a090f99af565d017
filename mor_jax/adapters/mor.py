"""Mixture of Ranks (arXiv 2410.13408): N experts share one LoRA; an expert is a pair of scaling vectors.

    g = softmax(x w_g)                                     dense, float32, per token
    delta = s sum_i g_i (((x a) * lam_a[i]) b) * lam_b[i]  s = alpha / rank

computed as one matmul: z[(i, k)] = g_i (x a)_k lam_a[i, k], bcat[(i, k), o] = b[k, o] lam_b[i, o], delta = s z bcat.
One token sees a map of rank at most ``rank``; the outputs of many tokens span up to min(N rank, out).

From the paper: dense softmax routing, shared factors, scaling vectors per expert, on the FFN's gate, up and down; N = 8
and rank 32 did best, past 12 and 64 worse. Ours: the defaults of rank, alpha and dropout, the start (a uniform, b 0,
lam 1, w_g ~ N(0, 0.02^2)), ``lam_std``, ``top_k``, the scope ``block``, the form of the balance loss, that the router
reads x before dropout and that weight decay spares lam, whose neutral value is 1. With lam all ones *and* w_g = 0 the
experts would never separate, hence the random router. A single gate is 1 whatever its router says: one expert has no
router, and ``top_k`` 1 is refused, as its router would stay where it was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, NotMergeable, Site
from mor_jax.adapters.low_rank import LowRank, expand, start_factors
from mor_jax.adapters.precision import full_precision
from mor_jax.adapters.routing import gate_statistics, softmax_gates, switch_balance

ROUTER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class MoR(LowRank):
    """Mixture of Ranks."""

    name: ClassVar[str] = "mor"
    title: ClassVar[str] = "MoR"
    paper: ClassVar[str] = "2410.13408"

    rank: int = 8  # columns of a, rows of b; the paper's ablation optimum is 32
    num_experts: int = 8  # N, the ablation optimum
    router: Literal["softmax", "mean", "balanced"] = "softmax"  # mean: every gate 1/N, mergeable
    scope: Literal["site", "block"] = "site"  # block: one gate a layer, from the layer's input
    block: str = r"(.*/)?layers(_\d+)?"  # modules that are a block when scope is block (full match of the path)
    top_k: int = 0  # 0: dense
    lam_std: float | None = None  # spread of lam around 1 at start; None: 0, and 0.02 for the mean router
    balance_weight: float = 0.01  # weight of the balance loss of the balanced router

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_positive("num_experts")
        self.require_choice("router", "softmax", "mean", "balanced")
        self.require_choice("scope", "site", "block")
        if not 0 <= self.top_k <= self.num_experts:
            raise ValueError(f"MoR.top_k must be between 0 and num_experts = {self.num_experts}, got {self.top_k}")
        if self.top_k == 1 < self.num_experts:
            raise ValueError(
                "MoR.top_k = 1 leaves every token one expert, of gate 1: no gradient would reach the router; "
                "choose 2 or more, or 0 for all experts"
            )
        if self.router == "mean" and (self.top_k or self.scope == "block"):
            raise ValueError("MoR.router 'mean' has no gate to place or cut: leave scope 'site' and top_k 0")
        if self.balance_weight < 0 or (self.lam_std or 0) < 0:
            raise ValueError(f"MoR.balance_weight and lam_std must not be negative, got {self}")

    @property
    def gate_block(self) -> str | None:
        """The pattern of the module that decides the gate, None for the site itself."""
        return self.block if self.scope == "block" and self.routed else None

    @property
    def num_gates(self) -> int:
        """N."""
        return self.num_experts

    @property
    def routed(self) -> bool:
        """All gates depend on the input but the mean router's, and that of a single expert."""
        return self.router != "mean" and self.num_experts > 1

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """{"a": (in, r), "b": (r, out), "lam_a": (N, r), "lam_b": (N, out)[, "router": (in, N)]}, float32."""
        key_a, key_router, key_lam_a, key_lam_b = jax.random.split(key, 4)
        count, std = self.num_experts, self.lam_std
        if std is None:
            std = 0.02 if self.router == "mean" else 0.0
        params = {
            **start_factors(key_a, site, self.rank),
            "lam_a": 1 + std * jax.random.normal(key_lam_a, (count, self.rank), jnp.float32),
            "lam_b": 1 + std * jax.random.normal(key_lam_b, (count, site.out_features), jnp.float32),
        }
        if self.routed and self.scope == "site":
            params |= self.init_gate(key_router, site.in_features)
        return Leaves(params)

    def init_gate(self, key: Array, in_features: int) -> dict[str, Array]:
        """{"router": (in, N)}, normal with standard deviation 0.02, float32."""
        return {"router": ROUTER_STD * jax.random.normal(key, (in_features, self.num_experts), jnp.float32)}

    def num_gate_params(self, in_features: int) -> int:
        """in N."""
        return in_features * self.num_experts

    def input_factor(self, leaves: Leaves) -> Array:
        """[a | w_g]: (in, r + N), or a alone where the site has no router."""
        if "router" not in leaves.params:
            return leaves.params["a"]
        return jnp.concatenate([leaves.params["a"], leaves.params["router"]], axis=1)

    def prepare(self, leaves: Leaves, kernel: Kernel) -> Leaves:
        """Adds s bcat: (N r, out) under "bcat", formed in float32."""
        if "bcat" in leaves.params:
            return leaves
        b, lam_b = leaves.params["b"], leaves.params["lam_b"]
        bcat = self.scale * b[..., None, :, :] * lam_b[..., :, None, :]
        bcat = bcat.reshape(*b.shape[:-2], self.num_experts * self.rank, b.shape[-1])
        return leaves._replace(params={**leaves.params, "bcat": bcat})

    def gate(self, leaves: Leaves, h: Array, inputs: AdapterInputs) -> Array:
        """(..., N) float32 from x [a | w_g] at a site, or from the block's input (..., in) at a block."""
        if not self.routed:
            return jnp.full((*h.shape[:-1], self.num_experts), 1 / self.num_experts, jnp.float32)
        if self.scope == "block":
            router = leaves.params["router"].astype(h.dtype)
            logits = jnp.matmul(h, router, preferred_element_type=jnp.float32)
        else:
            logits = h[..., self.rank :]
        return softmax_gates(logits, self.top_k)

    def balance(self, gates: Array, mask: Array | None) -> Array | None:
        """balance_weight times the Switch loss for the balanced router, else None."""
        return self.balance_weight * switch_balance(gates, mask) if self.router == "balanced" and self.routed else None

    def statistics(self, leaves: Leaves, x: Array, gates: Array | None, inputs: AdapterInputs) -> dict[str, Array]:
        """Sums of load, entropy and count, and per task where tasks are known."""
        return {} if gates is None or not self.routed else gate_statistics(gates, inputs)

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array:
        """s z bcat for x [a | w_g]: (..., r + N) and gates (..., N), as (..., out).

        lam_a * g and b * lam_b are formed in float32 and rounded once: in bfloat16 lam is 1 until it differs by 0.002.
        """
        if gates is None:
            raise ValueError("MoR.delta needs gates: (..., num_experts)")
        leaves = self.prepare(leaves, kernel)
        dtype, hidden = base_output.dtype, x[..., : self.rank]
        z = gates[..., :, None] * hidden[..., None, :] * leaves.params["lam_a"]
        z = z.reshape(*hidden.shape[:-1], self.num_experts * self.rank)
        return expand(z.astype(dtype), leaves.params["bcat"].astype(dtype))

    def num_params(self, site: Site) -> int:
        """r (in + out) + N (r + out), and N in for a router at the site, a layer."""
        count = self.num_experts * (self.rank + site.out_features)
        if self.routed and self.scope == "site":
            count += self.num_gate_params(site.in_features)
        return super().num_params(site) + site.num_layers * count

    def decays(self, leaf: str, ndim: int) -> bool:
        """a, b and the router; lam is neutral at 1, and decay would shrink the change of all experts alike."""
        return leaf not in ("lam_a", "lam_b") and super().decays(leaf, ndim)

    @full_precision
    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array] | None:
        """Of the mean router or one expert, (a, s (sum_i lam_a[i] x lam_b[i] / N) * b)."""
        if self.routed:
            return None
        return self._mixed(leaves, jnp.full((self.num_experts,), 1 / self.num_experts, jnp.float32))

    def _mixed(self, leaves: Leaves, gates: Array) -> tuple[Array, Array]:
        params = leaves.params
        mixed = jnp.einsum("n,nr,no->ro", gates.astype(jnp.float32), params["lam_a"], params["lam_b"])
        return params["a"], self.scale * mixed * params["b"]

    @full_precision
    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """W + s a ((sum_i g_i lam_a[i] x lam_b[i]) * b) for constant gates g: (N,); the mean router brings its own.

        Raises:
            NotMergeable: if the router reads the input and no gates are given.
        """
        if gates is None:
            if self.routed:
                raise NotMergeable(
                    "MoR's gates depend on the input, so no merged kernel equals it; choose an approximation "
                    "(--gates least_squares, mean or task:NAME), or train with router='mean'"
                )
            return super().merge(leaves, kernel)
        a, mixed = self._mixed(leaves, gates)
        return kernel.replace(kernel.dense() + a @ mixed)

    def logical_axes(self, site: Site) -> dict[str, tuple[str | None, ...]]:
        """a and the router follow the kernel's inputs, b and lam_b its outputs."""
        axes = {**super().logical_axes(site), "lam_a": (None, None), "lam_b": (None, "out")}
        return {**axes, "router": ("in", None)} if self.routed and self.scope == "site" else axes
