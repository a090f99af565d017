"""A frozen kernel as the matrix that it is, whatever its axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Kernel:
    """A view of a frozen kernel of any rank as the matrix (in, out) that it is, or as a stack of them.

    Attributes:
        value: The array as the model stores it; axes before the kernel's own are layers.
        in_axes: Its contracted axes, negative, in the order in which x is flattened.
        out_axes: Its produced axes, negative.
    """

    value: Array
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        shape = self.value.shape
        return math.prod(shape[a] for a in self.in_axes), math.prod(shape[a] for a in self.out_axes)

    @property
    def dtype(self) -> Any:
        """The stored dtype."""
        return self.value.dtype

    @property
    def _order(self) -> tuple[int, ...]:
        ndim = self.value.ndim
        own = self.in_axes + self.out_axes
        return tuple(range(ndim - len(own))) + tuple(a + ndim for a in own)

    def dense(self, dtype: Any = jnp.float32) -> Array:
        """The kernel as a matrix of ``dtype``: (in, out), or (layers, in, out)."""
        layers = self.value.shape[: self.value.ndim - len(self.in_axes + self.out_axes)]
        return jnp.transpose(self.value, self._order).reshape(*layers, *self.shape).astype(dtype)

    def column_norm(self) -> Array:
        """L2 norm over ``in`` of each output: (out,) or (layers, out), float32."""
        return jnp.sqrt(jnp.sum(jnp.square(self.dense()), axis=-2))

    def replace(self, new: Array) -> Array:
        """``new``, shaped like ``dense()``, in the stored layout and dtype (rounded once)."""
        order = self._order
        shape = tuple(self.value.shape[a] for a in order)
        inverse = tuple(order.index(a) for a in range(len(order)))
        return jnp.transpose(new.reshape(shape), inverse).astype(self.value.dtype)
