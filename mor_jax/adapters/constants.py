"""Random constants that are rebuilt from a seed instead of saved, bit-equal on every device so that checksums hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def constants_key(seed: int, *identifiers: int | Array) -> Array:
    """A key for constants that are rebuilt instead of saved: threefry2x32 whatever the user's default generator is."""
    key = jax.random.key(seed, impl="threefry2x32")
    for identifier in identifiers:
        key = jax.random.fold_in(key, identifier)
    return key


def rebuildable_uniform(key: Array, bound: float, shape: tuple[int, ...]) -> Array:
    """U(-bound, bound), float32, bit-equal on every device: the only inexact operation is one multiplication."""
    return bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def rebuildable_normal(key: Array, std: float, shape: tuple[int, ...]) -> Array:
    """N(0, std^2) to a good approximation, float32, bit-equal on every device.

    The sum of twelve uniform bytes, centred: whole numbers and one multiplication. ``jax.random.normal`` goes through
    a polynomial that compilers round differently, so its values could not be compared by their checksum.
    """
    words = jax.random.bits(key, (*shape, 3), jnp.uint32)
    total = sum((words >> shift) & 255 for shift in (0, 8, 16, 24)).astype(jnp.int32).sum(-1)  # pyright: ignore[reportAttributeAccessIssue]
    return (2 * total - 12 * 255).astype(jnp.float32) * (std / (2 * 65535**0.5))
