"""The interface of a fine-tuning method: a frozen dataclass of hyper-parameters with pure functions over small pytrees.

A method describes *one* linear map of *one* layer: ``y = x @ W + delta(x)`` with a frozen kernel ``W: (in, out)``.
Injection runs it inside a whole Flax model, merging maps it over the frozen parameters; neither knows it by name.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters.kernel import Kernel
from mor_jax.adapters.precision import full_precision
from mor_jax.adapters.settings import Settings

if TYPE_CHECKING:
    from mor_jax.adapters.rules import Event, UpdateTransform

GATED_PRODUCT = "gated_product"  # the name of a thin product that decides a gate and that recomputation may spare


class NotMergeable(ValueError):
    """A method has no exact merge for what was asked; the message names what to do instead."""


@dataclass(frozen=True)
class Site:
    """One linear map of a model, known statically.

    Attributes:
        path: The module's path, joined by "/".
        in_features: Size of the contracted axes together.
        out_features: Size of the produced axes together.
        num_layers: How many maps the leaves are stacked over: layers, and experts of a layer.
        first_layer: Place in the model's depth of the first of them; 0 but for layers that are modules of their own.
        depth: How many layers of this kind the model has; 0 stands for ``layers``.
        layer_axes: (stride, size) of those axes of the stack that are layers, outermost first; None where all are.
            What the others tell apart (experts) lies side by side in one layer.
    """

    path: str
    in_features: int
    out_features: int
    num_layers: int = 1
    first_layer: int = 0
    depth: int = 0
    layer_axes: tuple[tuple[int, int], ...] | None = None

    @property
    def layers(self) -> int:
        """How many layers of the model's depth the maps belong to."""
        return self.num_layers if self.layer_axes is None else math.prod(size for _, size in self.layer_axes)

    def layer_of(self, index: Array | int) -> Array | int:
        """The layer, counted from the site's first, of the map with this number in the stack; may be traced."""
        if self.layer_axes is None:
            return index
        place: Array | int = 0
        for stride, size in self.layer_axes:
            place = place * size + index // stride % size
        return place


def site_id(path: str) -> int:
    """A number for a path that does not depend on the other sites, for keys."""
    return zlib.crc32(path.encode()) & 0x7FFFFFFF


class Leaves(NamedTuple):
    """A method's arrays for one layer of one site (or, stacked, for all its layers).

    Attributes:
        params: Trained and saved.
        state: Saved, not differentiated; changed only by a rule or a loader.
        constants: Rebuilt from seed and site, never saved.
    """

    params: dict[str, Array]
    state: dict[str, Array] = {}
    constants: dict[str, Array] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterInputs:
    """What a method may know of a batch beside x. Arrays are (B, S) int32; 0 means padding.

    Attributes:
        segment_ids: Which packed example a token belongs to, 0 for padding.
        prompt_mask: 1 on prompt tokens.
        task_ids: The task of each token, from 0.
        positions: Positions that restart in each segment.
        adapter_weights: Per-example weights of adapters.
        rank: The drawn rank (DyLoRA).
        noise_step: The optimiser step that noise is drawn for (HaLoRA).
        chain: What earlier layers left for this one (ResLoRA); injection sets it, for one site at a time.
        clean_x: x before dropout, (..., in), where a site's x went through it; injection sets it likewise.
        kept: Which entries of it dropout left, (..., in) bool; set beside ``clean_x``.
        key: Root key of this micro-batch; a site's own key is ``fold_in(key, site id)``.
        auxiliary_scale: Balance losses enter the gradient times this; None switches them off.
        deterministic: False while training with dropout.
        num_tasks: How many tasks the statistics tell apart.
        wired: Whether the caller's loop does what methods bring for training: rules, learning rates, penalties. Where
            it does not say so, the first derivative logs what it leaves out.
    """

    segment_ids: Array | None = None
    prompt_mask: Array | None = None
    task_ids: Array | None = None
    positions: Array | None = None
    adapter_weights: Array | None = None
    rank: Array | None = None
    noise_step: Array | None = None
    chain: Any = None
    clean_x: Array | None = None
    kept: Array | None = None
    key: Array | None = None
    auxiliary_scale: Array | None = None
    deterministic: bool = field(default=True, metadata={"static": True})
    num_tasks: int = field(default=0, metadata={"static": True})
    wired: bool = field(default=False, metadata={"static": True})


@dataclass(frozen=True, kw_only=True)
class Adapter(Settings):
    """A fine-tuning method. A final class defines ``init``, ``delta``, ``num_params`` and ``factors`` or ``merge``."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    starts_at_zero: ClassVar[bool] = True
    gate_lifetime: ClassVar[str] = "token"
    rule_name: ClassVar[str] = ""  # of a method whose rule no option switches off
    training_inputs: ClassVar[tuple[str, ...]] = ()  # `AdapterInputs` without which a training loop leaves it out
    optional_rule: ClassVar[str] = ""  # what `rule` becomes, and with which option, where it is off by default

    dropout: float = 0.0  # probability of dropping an entry of x before the factors, while training

    def __post_init__(self) -> None:
        """Checks the fields that all methods share."""
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{type(self).__name__}.dropout must be in [0, 1), got {self.dropout}")

    @property
    def gate_block(self) -> str | None:
        """Regular expression of the module whose input decides the gate; None: the site itself."""
        return None

    @property
    def num_gates(self) -> int:
        """Experts that a gate weighs; 0 without a gate."""
        return 0

    @property
    def routed(self) -> bool:
        """Whether the gate depends on the input, so that no exact merge exists."""
        return False

    @property
    def chained(self) -> bool:
        """Whether the change also reads what earlier layers hand on (``init_chain``); its model threads a carry."""
        return False

    @property
    def linked(self) -> bool:
        """Whether ``link`` adds something."""
        return False

    @property
    def merges_exactly(self) -> bool:
        """Whether ``merge`` equals the forward pass without calibration data."""
        return not (self.routed or self.chained)

    @property
    def merge_condition(self) -> str:
        """The option that has to be set before ``merge`` does anything; "" where it simply does."""
        return ""

    @property
    def rule(self) -> str:
        """One word for what happens while training beside the optimiser; "" for nothing."""
        return self.rule_name

    def init(self, key: Array, site: Site, layer: Array, kernel: Kernel) -> Leaves:
        """Leaves of one map, params float32. ``layer``, its number in the stack, is an int32 scalar, maybe traced."""
        raise TypeError(f"{type(self).__name__} must define init")

    def shared(self, key: Array, sites: tuple[Site, ...]) -> Leaves:
        """Leaves that all ``sites`` of this method share, made once a model; their names differ from ``init``'s.

        Every function here gets them among the leaves of a site, without a layer axis; ``prepare`` does not.
        """
        return Leaves({})

    def link(self, leaves: Leaves) -> Leaves:
        """Leaves of all layers of one site, layer axis first, with what each needs of the earlier layers' leaves.

        Differentiable, called once a step, and the identity on its own result.
        """
        return leaves

    def init_chain(self, site: Site, kept: tuple[int, ...], dtype: Any) -> Any:
        """What the first layer finds in ``AdapterInputs.chain``, for x: (*kept, in) of ``dtype``."""
        return None

    def input_norm(self, leaves: Leaves, second_moment: Array) -> Array:
        """Of a chained method, the norm of what a layer hands on, (...,), from the sum of x^T x: (..., in, in)."""
        raise TypeError(f"{type(self).__name__} hands nothing on")

    def weight_norm(self, leaves: Leaves, kernel: Kernel) -> Array:
        """Of a chained method, the norm of each layer's merged kernel, (...,)."""
        raise TypeError(f"{type(self).__name__} hands nothing on")

    def earlier_share(self, norms: Array, by: Literal["input", "weight"] = "input") -> Array:
        """Of a chained method, the constant gate of each layer of a chain, (layers,), from the norms: (layers,).

        Args:
            norms: Of ``input_norm``, or of ``weight_norm``.
            by: Which of the two.
        """
        raise TypeError(f"{type(self).__name__} hands nothing on")

    def delta(
        self, leaves: Leaves, x: Array, base_output: Array, kernel: Kernel, gates: Array | None, inputs: AdapterInputs
    ) -> Array | tuple[Array, Any]:
        """The change of the output, (..., out) in the dtype of ``base_output``; with ``inputs.chain``, (change, chain).

        Args:
            leaves: One layer's leaves.
            x: (..., in), after dropout; or, for a method with an ``input_factor``, ``x @ input_factor`` in float32.
            base_output: (..., out), the layer's output less its bias.
            kernel: The frozen kernel.
            gates: (..., N) float32, or None for a method without a gate.
            inputs: What is known of the batch.
        """
        raise TypeError(f"{type(self).__name__} must define delta")

    def output(self, leaves: Leaves, x: Array, kernel: Kernel, inputs: AdapterInputs) -> Array | None:
        """Base output and change in one, (..., out) less the bias, where that is cheaper than their sum; else None.

        The same number as ``x @ kernel + delta``, in whose place it may be taken: the base's own product is then not
        computed. Asked only where the module surely is that product. x is (..., in) itself, in the dtype of the result.
        """
        return None

    def num_params(self, site: Site) -> int:
        """Trained parameters of a site over all its layers, gates at blocks apart."""
        raise TypeError(f"{type(self).__name__} must define num_params")

    def factors(self, leaves: Leaves, kernel: Kernel) -> tuple[Array, Array] | None:
        """(in, k) and (k, out), float32, whose product is the whole change of the kernel, scale included.

        None where no two constant thin factors are all that the method does. Formats that know LoRA alone hold those
        that are.
        """
        return None

    @full_precision
    def merge(self, leaves: Leaves, kernel: Kernel, gates: Array | None = None) -> Array:
        """The kernel with the adapter folded in, in the kernel's layout and dtype: plus ``factors``, where it has any.

        Raises:
            NotMergeable: if the gate depends on the input and ``gates: (N,)`` is not given.
        """
        pair = self.factors(leaves, kernel)
        if pair is None:
            raise TypeError(f"{type(self).__name__} must define merge, or factors")
        return kernel.replace(kernel.dense() + pair[0] @ pair[1])

    def padded_params(self, site: Site) -> int:
        """Entries of the trained leaves, with the ranks that only fill up a static shape."""
        return self.num_params(site)

    @property
    def largest_drawn_rank(self) -> int:
        """The largest rank that each training step may draw for ``AdapterInputs.rank``; 0 draws none."""
        return 0

    def at_rank(self, leaves: Leaves, rank: int) -> tuple[Adapter, Leaves]:
        """A smaller method and its leaves, for one layer or a stack of them.

        Raises:
            ValueError: if the method was not trained for smaller ranks; names one that is.
        """
        raise ValueError(f"{self.title} has one rank only: leave --rank out, or train with dylora")

    def rules(self, total_steps: int) -> tuple[UpdateTransform | Event, ...]:
        """What happens while training for ``total_steps`` optimiser steps; sites whose rules are equal act as one."""
        return ()

    def penalty(self, leaves: Leaves) -> Array | None:
        """A float32 scalar of one layer, weight included, whose mean over sites and layers joins the loss; or None."""
        return None

    def decays(self, leaf: str, ndim: int) -> bool:
        """Whether weight decay pulls a trained leaf of ``ndim`` axes in one layer toward 0.

        Matrices decay and vectors do not, as usual for AdamW: factors, square matrices and routers, whose 0 adds
        nothing or weighs all alike, but no magnitude and no weight of ranks. A method that has a matrix whose neutral
        value is another than 0 says so.
        """
        return ndim >= 2

    def labels(self, params: Mapping[str, Any]) -> dict[str, str]:
        """The group of each trained leaf; groups may have learning rates of their own."""
        return {name: name for name in params}

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        """By group, its learning rate over that of the run."""
        return {}

    def drop(self, x: Array, inputs: AdapterInputs) -> Array:
        """x: (..., in) with the entries dropped that dropout took from this site's own x; x where it took none."""
        if inputs.kept is None:
            return x
        return jnp.where(inputs.kept, x / (1 - self.dropout), jnp.zeros_like(x))

    def input_factor(self, leaves: Leaves) -> Array | None:
        """(in, k): everything that x is multiplied with, so that sites with one x can share one matmul."""
        return None

    def prepare(self, leaves: Leaves, kernel: Kernel) -> Leaves:
        """Leaves with what needs computing only once a step; differentiable, and the identity on its own result.

        Leaves and kernel may have leading layer axes: injection calls it outside the model's scan.
        """
        return leaves

    def init_gate(self, key: Array, in_features: int) -> dict[str, Array]:
        """Leaves of a gate that lives at a block; empty for gates at their sites."""
        return {}

    def num_gate_params(self, in_features: int) -> int:
        """Parameters of one block's gate."""
        return 0

    def gate(self, leaves: Leaves, h: Array, inputs: AdapterInputs) -> Array | None:
        """(..., N) float32 from ``h``, or None without a gate.

        At a site h is what ``delta`` gets as x, but before dropout: which expert a token needs is no matter of chance.
        """
        return None

    def balance(self, gates: Array, mask: Array | None) -> Array | None:
        """The balance loss of one gate, a float32 scalar already times its weight, or None."""
        return None

    def statistics(self, leaves: Leaves, x: Array, gates: Array | None, inputs: AdapterInputs) -> dict[str, Array]:
        """Sums over the tokens of this call, float32, none 0-d; they leave the model by probe leaves.

        A method with a gate gets what ``gate`` gets; one without (``gates`` is None) gets x itself, (..., in), before
        any dropout.
        """
        return {}

    def logical_axes(self, site: Site) -> Mapping[str, tuple[str | None, ...]]:
        """For each trained leaf of one layer which axis follows the kernel's "in" or "out" sharding."""
        return {}
