"""Which Flax modules are linear maps, and how each contracts its input with its kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Contraction:
    """How a module's call multiplies x with its kernel.

    With batch axes (experts, say) the kernel is one map for each of their entries, and x has an axis for each of them:
    kernel (experts, in, out) with x (experts, ..., in) is
    ``Contraction(batch_axes=(-3,), x_batch_axes=(0,))``. Each entry gets an adapter of its own.

    Attributes:
        x_axes: Axes of x that are contracted, negative or not.
        in_axes: Their counterparts in the kernel as the module sees it, negative.
        out_axes: The kernel's produced axes, negative.
        y_order: Transposition that brings the output to (batch axes, kept axes of x, produced axes); None where it is
            so already.
        batch_axes: The kernel's axes that are neither contracted nor produced, negative.
        x_batch_axes: Their counterparts in x, negative or not.
    """

    x_axes: tuple[int, ...] = (-1,)
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)
    y_order: tuple[int, ...] | None = None
    batch_axes: tuple[int, ...] = ()
    x_batch_axes: tuple[int, ...] = ()

    def contracts_last_axis(self, ndim: int) -> bool:
        """Whether the last axis of an x of ``ndim`` axes, and no other, is contracted, and nothing is to be moved."""
        return not self.batch_axes and tuple(a % ndim for a in self.x_axes) == (ndim - 1,)

    def flatten_input(self, x: Array) -> Array:
        """X as (batch axes..., kept axes..., in): x itself where its last axis alone is contracted."""
        if self.contracts_last_axis(x.ndim):
            return x
        batch, kept, axes = self._axes_of(x.ndim)
        moved = jnp.transpose(x, batch + kept + axes)
        return moved.reshape(*(x.shape[a] for a in batch + kept), -1)

    def _axes_of(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Axes of an x of ``ndim`` axes: (batch, kept, contracted)."""
        axes = tuple(a % ndim for a in self.x_axes)
        batch = tuple(a % ndim for a in self.x_batch_axes)
        return batch, tuple(a for a in range(ndim) if a not in axes + batch), axes

    def kept_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a flattened x less its last axis."""
        batch, kept, _ = self._axes_of(len(shape))
        return tuple(shape[axis] for axis in batch + kept)

    def flatten_output(self, y: Array, kept: tuple[int, ...]) -> Array:
        """The module's output as (kept..., out), ``kept`` being the shape of the flattened x less its last axis."""
        y = y if self.y_order is None else jnp.transpose(y, self.y_order)
        return y.reshape(*kept, math.prod(y.shape) // max(math.prod(kept), 1))

    def place_bias(self, bias: Array, ndim: int) -> Array:
        """The bias, an axis for each batch and produced axis in the order of the output, so that it broadcasts to it.

        One without batch axes is the same for all of them.
        """
        count, batch = len(self.out_axes), len(self.batch_axes) if bias.ndim > len(self.out_axes) else 0
        if self.y_order is None and not batch:
            return bias
        order = tuple(range(ndim)) if self.y_order is None else self.y_order
        shape = [1] * ndim
        for axis, size in zip(sorted(order[:batch] + order[ndim - count :]), bias.shape, strict=True):
            shape[axis] = size
        return bias.reshape(shape)

    def restore_output(self, delta: Array, y: Array) -> Array:
        """(kept..., out) in the shape of the module's output ``y``."""
        if self.y_order is None:
            return delta.reshape(y.shape)
        inverse = tuple(self.y_order.index(a) for a in range(y.ndim))
        return jnp.transpose(delta.reshape(tuple(y.shape[a] for a in self.y_order)), inverse)

    def one_map(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(contracted, produced) axes of one map's kernel, whose batch axes are gone."""

        def without(axis: int) -> int:
            return axis + sum(batch > axis for batch in self.batch_axes)

        return tuple(map(without, self.in_axes)), tuple(map(without, self.out_axes))

    def check(self, x: tuple[int, ...], kernel: tuple[int, ...], y: tuple[int, ...]) -> None:
        """Returns when these shapes can be those of a call.

        Raises:
            ValueError: an axis of the kernel is left over or named twice, or sizes do not fit.
        """
        ndim, named = len(kernel), self.in_axes + self.out_axes + self.batch_axes
        left = sorted(set(range(-ndim, 0)) - set(named))
        if left or len(named) != ndim:
            what = f"leaves axis {left[0] + ndim} out" if left else "names an axis twice, or one that is not there"
            raise ValueError(
                f"its contraction {what} of a kernel of shape {kernel}: give its LinearKind a contraction that says of "
                "every axis whether it is contracted (in_axes), produced (out_axes) or one of several maps (batch_axes)"
            )
        given = self.x_axes + self.x_batch_axes
        if any(not -len(x) <= axis < len(x) for axis in given):
            raise ValueError(f"its contraction names axis {max(given, key=abs)} of an x of shape {x}")
        batch, kept, axes = self._axes_of(len(x))
        pairs = ((axes, self.in_axes), (batch, self.batch_axes))
        if any(math.prod(x[a] for a in ours) != math.prod(kernel[a] for a in theirs) for ours, theirs in pairs):
            raise ValueError(
                f"its contraction pairs axes {axes + batch} of an x of shape {x} with axes "
                f"{self.in_axes + self.batch_axes} of a kernel of shape {kernel}, whose sizes differ: give its "
                "LinearKind the right in_axes and out_axes"
            )
        size = math.prod(x[a] for a in batch + kept) * math.prod(kernel[a] for a in self.out_axes)
        if size != math.prod(y) or (self.y_order is not None and sorted(self.y_order) != list(range(len(y)))):
            raise ValueError(
                f"its contraction of an x of shape {x} with a kernel of shape {kernel} does not give its output of "
                f"shape {y}: give its LinearKind the right out_axes and y_order"
            )


@dataclass(frozen=True)
class LinearKind:
    """A kind of linear module, built in or the user's own.

    Attributes:
        predicate: Whether a module is of this kind.
        kernel_leaf: Name of the kernel among the module's parameters.
        contraction: ``(module, x, kernel shape) -> Contraction``.
        bias_leaf: Name of the bias that is added along the last axes of the output.
        reads_equation: Whether ``contraction`` also gets the einsum equation that a call was given, or None, as a
            fourth argument (``einsum_contraction`` understands it).
    """

    predicate: Callable[[nn.Module], bool]
    kernel_leaf: str = "kernel"
    contraction: Callable[..., Contraction] = lambda module, x, shape: Contraction()
    bias_leaf: str = "bias"
    reads_equation: bool = False

    def contract(
        self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], shape: tuple[int, ...]
    ) -> Contraction:
        """How a call of ``module`` contracts its first array with a kernel of ``shape``; kernel axes negative."""
        x = first_argument(args, kwargs)
        if self.reads_equation:
            texts = (value for value in (*args, *kwargs.values()) if isinstance(value, str) and "->" in value)
            found = self.contraction(module, x, shape, next(texts, None))
        else:
            found = self.contraction(module, x, shape)
        if not isinstance(found, Contraction):
            raise ValueError(f"its LinearKind's contraction must give a Contraction, not {type(found).__name__}")
        ndim = len(shape)
        own = {name: getattr(found, name) for name in ("in_axes", "out_axes", "batch_axes")}
        negative = {name: tuple(a - ndim if 0 <= a < ndim else a for a in axes) for name, axes in own.items()}
        return dataclasses.replace(found, **negative)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module reads: its first array, by place or by name; its first argument where none is an array.

    Of a layer that is called with `(x, carry)` it is x. Some models' own linear classes take the contraction first:
    `module("BTD,DF->BTF", x)`.
    """
    given = [value[0] if isinstance(value, tuple) and value else value for value in (*args, *kwargs.values())]
    return next((value for value in given if hasattr(value, "shape")), given[0] if given else None)


def _dense_general(module: Any, x: Array, shape: tuple[int, ...]) -> Contraction:
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    batch = module.batch_dims if isinstance(module.batch_dims, tuple) else (module.batch_dims,)
    count, first, ndim = len(axes), len(batch), len(shape)
    return Contraction(
        tuple(sorted(a % x.ndim - x.ndim for a in axes)),
        tuple(range(first - ndim, first + count - ndim)),
        tuple(range(first + count - ndim, 0)),
        None,
        tuple(range(-ndim, first - ndim)),
        tuple(range(first)),
    )


def einsum_contraction(equation: str, ndim: int, shape: tuple[int, ...]) -> Contraction:
    """The contraction of an einsum equation "x,kernel->output", ellipses included, for an x of ``ndim`` axes.

    Letters that x, kernel and output share are batch axes: one map for each of their entries.

    Raises:
        ValueError: the equation is no linear map of x by a kernel.
    """
    x, kernel, output = _letters(equation, ndim, len(shape))
    contracted = [c for c in kernel if c in x and c not in output]
    batch = [c for c in kernel if c in x and c in output]
    produced = [c for c in kernel if c in output and c not in x]
    kept = [c for c in x if c not in kernel]
    repeated = any(len(set(part)) < len(part) for part in (x, kernel, output))
    lost = [c for c in kept if c not in output] + [c for c in kernel if c not in contracted + batch + produced]
    if repeated or lost or not contracted:
        why = "repeats a letter" if repeated else f"sums over {lost[0]!r} alone" if lost else "contracts no axis"
        raise ValueError(f"{equation!r} {why}, so it is no linear map of x")
    order = tuple(output.index(c) for c in batch + kept + produced)
    return Contraction(
        tuple(x.index(c) - len(x) for c in contracted),
        tuple(kernel.index(c) - len(kernel) for c in contracted),
        tuple(kernel.index(c) - len(kernel) for c in produced),
        None if order == tuple(range(len(order))) else order,
        tuple(kernel.index(c) - len(kernel) for c in batch),
        tuple(x.index(c) - len(x) for c in batch),
    )


def _letters(equation: str, x_ndim: int, kernel_ndim: int) -> tuple[list[str], list[str], list[str]]:
    """The letters of x, kernel and output, with letters of their own for the axes that an ellipsis stands for."""
    text = equation.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2 or any(part.count("...") > 1 for part in (*parts, output)):
        raise ValueError(f"{equation!r} is not of the form 'x,kernel->output'")
    hidden = [ndim - len(part.replace("...", "")) for part, ndim in zip(parts, (x_ndim, kernel_ndim), strict=True)]
    if any(count < 0 or (count and "..." not in part) for part, count in zip(parts, hidden, strict=True)):
        raise ValueError(f"{equation!r} does not fit an x of {x_ndim} and a kernel of {kernel_ndim} axes")
    names = [f"axis {n}" for n in range(max(hidden), 0, -1)]

    def spelled(part: str, count: int) -> list[str]:
        before, dots, after = part.partition("...")
        return [*before, *(names[len(names) - count :] if dots and count else []), *after]

    return spelled(parts[0], hidden[0]), spelled(parts[1], hidden[1]), spelled(output, len(names))


def _einsum(module: Any, x: Array, shape: tuple[int, ...], equation: str | None) -> Contraction:
    text = equation or module.einsum_str
    if not text:
        raise ValueError("give nn.Einsum its einsum_str")
    return einsum_contraction(text, x.ndim, shape)


DEFAULT_KINDS: tuple[LinearKind, ...] = (
    LinearKind(lambda module: isinstance(module, nn.Dense)),
    LinearKind(lambda module: isinstance(module, nn.DenseGeneral), contraction=_dense_general),
    LinearKind(lambda module: isinstance(module, nn.Einsum), contraction=_einsum, reads_equation=True),
)


def find_kind(module: nn.Module, kinds: tuple[LinearKind, ...]) -> LinearKind | None:
    """The first kind whose predicate holds for ``module``, or None."""
    return next((kind for kind in kinds if kind.predicate(module)), None)
