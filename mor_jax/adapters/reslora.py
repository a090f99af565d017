"""ResLoRA (arXiv 2402.18039; the authors' code): residual paths from the LoRAs of earlier layers to later ones.

For the same module of layers n = 0, 1, ... with inputs x_n, ``form`` says what is handed on:

    input    delta_n = s (x_n + x_{n-1}) a_n b_n                 the first layer has x_0 twice
    block    delta_n = s x_n sum_{k <= m} a_{n-k} b_{n-k}        merges exactly
    middle   delta_n = s (sum_{k <= m} x_{n-k} a_{n-k}) b_n

with k from 0, layers before the first left out, m = ``previous``, s = alpha / r. No parameters are added; gradients
flow through the chain. ``block`` needs only earlier factors, so they are put beside a layer's own once a step
(``link``), as one LoRA of rank (m + 1) r, in any model. ``input`` and ``middle`` need earlier activations, so the model
has to thread a carry through its layers; ours do.

Merging ``input`` and ``middle`` is approximate: W_n + s (1 + alpha_n) a_n b_n, alpha_n = sum_k f_{n-k} / f_n, where f
is the norm of x (``input``) or of x a (``middle``) over calibration data ("by input"). Of ``input`` it is also had
without data ("by weight"): x_n is about as long as the merged W_{n-1} makes it, so alpha_n = f_{n-2} / f_{n-1} with the
norms f of the merged weights, and 1 for n < 2. The paper reports about 1 % of accuracy lost by merging.

From the paper and its code: the three forms, both merges, a uniform, b 0, that ``input`` drops entries of the sum of
both x with one mask and ``middle`` of each layer's own x. Ours: ``block`` as the default, since it merges exactly, and
its one mask for all factors of a layer; m = 1; f of all calibration data at once, where the code takes the mean over a
window of recent batches; "by weight" W + s a b, where the code leaves s out and adds a b to the frozen W, which is
never changed here. A chain of one layer is complete in itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.base import AdapterInputs, Kernel, Leaves, NotMergeable, Site
from mor_jax.adapters.low_rank import LowRank, expand
from mor_jax.adapters.precision import full_precision

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResLoRA(LowRank):
    """LoRA with residual paths between layers."""

    name: ClassVar[str] = "reslora"
    title: ClassVar[str] = "ResLoRA"
    paper: ClassVar[str] = "2402.18039"

    form: Literal["input", "block", "middle"] = "block"  # what earlier layers hand on
    previous: int = 1  # m, how many earlier layers; -1: all of them

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is out of range."""
        super().__post_init__()
        self.require_choice("form", "input", "block", "middle")
        if self.previous < -1 or self.previous == 0:
            raise ValueError(f"ResLoRA.previous must be positive, or -1 for all, got {self.previous}")
        if self.form == "input" and self.previous != 1:
            raise ValueError(f"ResLoRA.form 'input' reads one earlier layer: leave previous 1, got {self.previous}")

    @property
    def linked(self) -> bool:
        """Every form: ``block`` gets factors, the others the knowledge that they are part of a chain."""
        return True

    @property
    def chained(self) -> bool:
        """``input`` and ``middle`` read earlier activations."""
        return self.form != "block"

    def link(self, leaves: Leaves) -> Leaves:
        """``block``: earlier factors, "chain_a": (layers, in, m r) and "chain_b": (layers, m r, out).

        The other forms of more than one layer get the constant "place": (layers, 1) int32, which forbids their merge.
        """
        params = leaves.params
        depth = params["a"].shape[0]
        if "chain_a" in params or depth == 1:
            return leaves
        if self.chained:
            return leaves._replace(constants={**leaves.constants, "place": jnp.arange(depth, dtype=jnp.int32)[:, None]})
        reach = depth - 1 if self.previous < 0 else min(self.previous, depth - 1)
        if self.previous < 0:
            _LOGGER.info("ResLoRA over all %d earlier layers computes with rank %d", reach, (reach + 1) * self.rank)
        chain_a = jnp.concatenate([_shifted(params["a"], k) for k in range(1, reach + 1)], axis=2)
        chain_b = jnp.concatenate([_shifted(params["b"], k) for k in range(1, reach + 1)], axis=1)
        return leaves._replace(params={**params, "chain_a": chain_a, "chain_b": chain_b})

    def init_chain(self, site: Site, kept: tuple[int, ...], dtype: Any) -> dict[str, Array]:
        """Zeros: "x": (*kept, in) and "started": (1,) for ``input``; "hidden": (m, *kept, rank) float32 for ``middle``.

        With all earlier layers the sum of their x a is enough, so m is 1 there.
        """
        if self.form == "input":
            return {"x": jnp.zeros((*kept, site.in_features), dtype), "started": jnp.zeros((1,), jnp.int32)}
        return {"hidden": jnp.zeros((max(self.previous, 1), *kept, self.rank), jnp.float32)}

    def input_factor(self, leaves: Leaves) -> Array | None:
        """a: (in, rank), beside it the earlier ones of ``block``; None for ``input``, which needs x itself."""
        if self.form == "input":
            return None
        return _joined(leaves, "a", axis=1)

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array | tuple[Array, Any]:
        """The change, (..., out), and within a chain what the next layer finds; x is x a but for ``input``."""
        dtype, chain = base_output.dtype, inputs.chain
        if self.form == "input":
            own = x if inputs.clean_x is None else inputs.clean_x
            earlier = own if chain is None else jnp.where(chain["started"] > 0, chain["x"], own)
            a = leaves.params["a"].astype(x.dtype)
            hidden = jnp.matmul(self.drop(own + earlier, inputs), a, preferred_element_type=jnp.float32)
            following = {"x": own, "started": jnp.ones((1,), jnp.int32)}
        elif self.form == "middle":
            earlier = jnp.zeros_like(x[None]) if chain is None else chain["hidden"]
            hidden = x + jnp.sum(earlier, axis=0)
            following = {"hidden": hidden[None] if self.previous < 0 else jnp.concatenate([x[None], earlier[:-1]])}
        else:
            hidden, following = x, None
        b = _joined(leaves, "b", axis=0) * self.scale
        change = expand(hidden.astype(dtype), b.astype(dtype))
        return change if chain is None else (change, following)

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array] | None:
        """Of ``block``, the layer's own factors beside the earlier ones, s with the latter; the others read inputs."""
        if self.chained:
            return None
        return _joined(leaves, "a", axis=1), self.scale * _joined(leaves, "b", axis=0)

    @full_precision
    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """W + s a b with the earlier factors (``block``), or W + s (1 + gates[0]) a b, gates: (1,) being alpha_n.

        Raises:
            NotMergeable: for a layer of an ``input`` or ``middle`` chain without gates.
        """
        if self.form == "block":
            return super().merge(leaves, kernel)
        if gates is None and "place" in leaves.constants:
            raise NotMergeable(
                f"ResLoRA's form {self.form!r} reads other layers, so no merged kernel equals it; choose an "
                "approximation (--gates mean or least_squares), or train with form='block'"
            )
        extra = gates[0] if gates is not None else 1.0 if self.form == "input" else 0.0
        return kernel.replace(kernel.dense() + self.scale * (1 + extra) * leaves.params["a"] @ leaves.params["b"])

    @full_precision
    def input_norm(self, leaves: Leaves, second_moment: Array) -> Array:
        """||x|| for ``input``, ||x a|| for ``middle``, over all tokens of the sum of x^T x: (..., in, in)."""
        if self.form == "input":
            return jnp.sqrt(jnp.trace(second_moment, axis1=-2, axis2=-1))
        a = leaves.params["a"]
        return jnp.sqrt(jnp.sum(a * (second_moment @ a), axis=(-2, -1)))

    @full_precision
    def weight_norm(self, leaves: Leaves, kernel: Kernel) -> Array:
        """||W + s a b|| of each layer, for ``input``.

        Raises:
            ValueError: for ``middle``, whose x a is not the output of a merged weight.
        """
        if self.form != "input":
            raise ValueError(f"ResLoRA's form {self.form!r} has no merge by weight; merge by input")
        merged = kernel.dense() + self.scale * leaves.params["a"] @ leaves.params["b"]
        return jnp.sqrt(jnp.sum(jnp.square(merged), axis=(-2, -1)))

    def earlier_share(self, norms: Array, by: Literal["input", "weight"] = "input") -> Array:
        """alpha: (layers,) from f: (layers,), the norms of the layers' inputs (of x a for ``middle``) or weights."""
        if by == "weight":
            ratios = norms[:-2] / jnp.where(norms[1:-1] > 0, norms[1:-1], 1.0)
            return jnp.ones_like(norms).at[2:].set(ratios)
        reach = len(norms) - 1 if self.previous < 0 else min(self.previous, len(norms) - 1)
        earlier = sum((_shifted(norms, k) for k in range(1, reach + 1)), jnp.zeros_like(norms))
        share = earlier / jnp.where(norms > 0, norms, 1.0)
        return share.at[0].set(1.0) if self.form == "input" else share


def _shifted(values: Array, count: int) -> Array:
    """Layer n gets what layer n - count had; the first ones get zeros."""
    return jnp.concatenate([jnp.zeros_like(values[:count]), values[:-count]])


def _joined(leaves: Leaves, name: str, axis: int) -> Array:
    chain = leaves.params.get("chain_" + name)
    own = leaves.params[name]
    return own if chain is None else jnp.concatenate([own, chain], axis=axis)
