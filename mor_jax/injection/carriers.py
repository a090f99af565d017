"""Values that leave a model as gradients, or enter it as such, in reverse mode alone: no function has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def emit(carrier: Array, probes: Any, statistics: Any) -> Array:
    """``carrier`` unchanged; the gradient of ``probes`` is ``statistics``, summed over the devices of a shard_map."""
    # Inside a shard_map all of them differ from device to device as the carrier does, even a count that happens not to.
    varying = jnp.sum(jax.lax.stop_gradient(carrier))
    statistics = jax.tree.map(lambda s: jnp.where(False, varying.astype(s.dtype), s), statistics)
    probes = jax.tree.map(lambda p, s: p + jax.lax.stop_gradient(s), probes, statistics)  # nobody reads the sums
    return _emit(carrier, probes, statistics)


@jax.custom_vjp
def _emit(carrier: Array, probes: Any, statistics: Any) -> Array:
    return carrier


_emit.defvjp(
    lambda carrier, probes, statistics: (carrier, statistics),
    lambda statistics, g: (g, statistics, jax.tree.map(jnp.zeros_like, statistics)),
)


@jax.custom_vjp
def add_gradient(carrier: Array, gradient: Array) -> Array:
    """``carrier`` unchanged; its gradient grows by ``gradient``."""
    return carrier


add_gradient.defvjp(lambda carrier, gradient: (carrier, gradient), lambda gradient, g: (g + gradient, None))
