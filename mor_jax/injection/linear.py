"""Which Flax modules are linear maps, and how each contracts its input with its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Contraction:
    """How a module's call multiplies x with its kernel.

    Attributes:
        x_axes: Axes of x that are contracted, negative or not.
        in_axes: Their counterparts in the kernel of one layer, negative.
        out_axes: The kernel's produced axes, negative.
        y_order: Transposition that brings the output to (kept axes of x, produced axes); None where it is so already.
    """

    x_axes: tuple[int, ...] = (-1,)
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)
    y_order: tuple[int, ...] | None = None

    def contracts_last_axis(self, ndim: int) -> bool:
        """Whether the last axis of an x of ``ndim`` axes, and no other, is contracted."""
        return tuple(a % ndim for a in self.x_axes) == (ndim - 1,)

    def flatten_input(self, x: Array) -> Array:
        """X as (kept axes..., in): x itself where its last axis alone is contracted."""
        if self.contracts_last_axis(x.ndim):
            return x
        axes = tuple(a % x.ndim for a in self.x_axes)
        kept = tuple(a for a in range(x.ndim) if a not in axes)
        moved = jnp.transpose(x, kept + axes)
        return moved.reshape(*(x.shape[a] for a in kept), -1)

    def flatten_output(self, y: Array, kept: tuple[int, ...]) -> Array:
        """The module's output as (kept..., out), ``kept`` being the shape of x less its contracted axes."""
        y = y if self.y_order is None else jnp.transpose(y, self.y_order)
        return y.reshape(*kept, -1)

    def place_bias(self, bias: Array, ndim: int) -> Array:
        """The bias, one axis for each produced axis in the order of the output, so that it broadcasts to an output."""
        if self.y_order is None:
            return bias
        shape = [1] * ndim
        for axis, size in zip(sorted(self.y_order[-len(self.out_axes) :]), bias.shape, strict=True):
            shape[axis] = size
        return bias.reshape(shape)

    def restore_output(self, delta: Array, y: Array) -> Array:
        """(kept..., out) in the shape of the module's output ``y``."""
        if self.y_order is None:
            return delta.reshape(y.shape)
        inverse = tuple(self.y_order.index(a) for a in range(y.ndim))
        return jnp.transpose(delta.reshape(tuple(y.shape[a] for a in self.y_order)), inverse)


@dataclass(frozen=True)
class LinearKind:
    """A kind of linear module, built in or the user's own.

    Attributes:
        predicate: Whether a module is of this kind.
        kernel_leaf: Name of the kernel among the module's parameters.
        contraction: ``(module, x, kernel shape) -> Contraction``.
        bias_leaf: Name of the bias that is added along the last axes of the output.
    """

    predicate: Callable[[nn.Module], bool]
    kernel_leaf: str = "kernel"
    contraction: Callable[[nn.Module, Array, tuple[int, ...]], Contraction] = lambda module, x, shape: Contraction()
    bias_leaf: str = "bias"


def _dense_general(module: nn.Module, x: Array, shape: tuple[int, ...]) -> Contraction:
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)  # pyright: ignore[reportAttributeAccessIssue]
    if module.batch_dims:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"{'/'.join(module.path)}: DenseGeneral with batch_dims is one map per batch entry, not one site"
        )
    count, ndim = len(axes), len(shape)
    axes = tuple(sorted(a % x.ndim for a in axes))
    return Contraction(axes, tuple(range(-ndim, count - ndim)), tuple(range(count - ndim, 0)))


def _einsum(module: nn.Module, x: Array, shape: tuple[int, ...]) -> Contraction:
    text = (module.einsum_str or "").replace(" ", "")  # pyright: ignore[reportAttributeAccessIssue]
    inputs, _, output = text.partition("->")
    x_letters, _, kernel_letters = inputs.partition(",")
    if not (x_letters and kernel_letters and output) or "..." in text:
        raise ValueError(f"{'/'.join(module.path)}: give nn.Einsum an explicit einsum_str as a field, got {text!r}")
    contracted = [c for c in kernel_letters if c in x_letters and c not in output]
    produced = [c for c in kernel_letters if c not in x_letters]
    if len(contracted) + len(produced) != len(kernel_letters):
        raise ValueError(
            f"{'/'.join(module.path)}: {text!r} keeps an axis of x and kernel, so it is not one linear map"
        )
    kept = [c for c in x_letters if c not in contracted]
    order = tuple(output.index(c) for c in kept + produced)
    ndim = len(shape)
    return Contraction(
        tuple(x_letters.index(c) for c in contracted),
        tuple(kernel_letters.index(c) - ndim for c in contracted),
        tuple(kernel_letters.index(c) - ndim for c in produced),
        None if order == tuple(range(len(order))) else order,
    )


DEFAULT_KINDS: tuple[LinearKind, ...] = (
    LinearKind(lambda module: isinstance(module, nn.Dense)),
    LinearKind(lambda module: isinstance(module, nn.DenseGeneral), contraction=_dense_general),
    LinearKind(lambda module: isinstance(module, nn.Einsum), contraction=_einsum),
)


def find_kind(module: nn.Module, kinds: tuple[LinearKind, ...]) -> LinearKind | None:
    """The first kind whose predicate holds for ``module``, or None."""
    return next((kind for kind in kinds if kind.predicate(module)), None)
