"""Next-token cross-entropy that never holds more than a chunk of logits.

With T tokens, width D and vocabulary V, the logits of a batch are T x V floats: more than everything else in memory.
Here `lax.scan` walks over chunks of tokens, and because the head is frozen the gradient of the hidden states,

    d loss / d hidden = mask * (softmax(hidden @ head) - onehot(target)) @ head.T,

is computed in the same pass while the chunk's logits are alive: the backward pass only multiplies it by a scalar.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    """(sum of -log p(target) over the masked tokens, number of them), both float32 scalars.

    Args:
      logits: (..., V), any float dtype; computed in float32.
      targets: (...) int32.
      mask: (...), 1 where a target counts.
    """
    mask = mask.astype(jnp.float32)
    losses, _ = _token_losses(logits.astype(jnp.float32), targets)
    return jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)), jnp.sum(mask)


def chunked_cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    chunk: int = 1024,
    softcap: float | None = None,
    vocabulary_axis: int = 1,
) -> tuple[Array, Array]:
    """`cross_entropy` of `hidden @ head` with only `chunk` tokens' logits alive; no gradient reaches `head`.

    Args:
      hidden: (B, S, D), the final hidden states.
      head: (D, V), or (V, D) with `vocabulary_axis` 0; frozen. It is read as it lies, without a transposed copy.
      targets: (B, S) int32.
      mask: (B, S), 1 where a target counts.
      chunk: tokens whose logits are alive at a time.
      softcap: c of c * tanh(logits / c), or None.
      vocabulary_axis: of `head`.

    Returns:
      (loss_sum, token_count), float32 scalars.
    """
    mask = mask.astype(jnp.float32)
    return _chunked(hidden, head, targets, mask, chunk, softcap, vocabulary_axis), jnp.sum(mask)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked(hidden, head, targets, mask, chunk, softcap, vocabulary_axis) -> Array:
    return _scan_chunks(hidden, head, targets, mask, chunk, softcap, vocabulary_axis, with_gradient=False)[0]


def _chunked_forward(hidden, head, targets, mask, chunk, softcap, vocabulary_axis):
    return _scan_chunks(hidden, head, targets, mask, chunk, softcap, vocabulary_axis, with_gradient=True)


def _chunked_backward(chunk, softcap, vocabulary_axis, gradient, cotangent):
    return (gradient * cotangent).astype(gradient.dtype), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _token_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log p(target) (...) and log sum exp (...) of float32 logits (..., V)."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_normalizer - chosen, log_normalizer


def _scan_chunks(hidden, head, targets, mask, chunk, softcap, vocabulary_axis, with_gradient):
    """(loss sum, gradient of hidden (B, S, D) or None).

    Each chunk takes evenly spaced tokens of every row, so that tokens stay on the devices that hold them.
    """
    batch, length, width = hidden.shape
    piece = max(1, min(length, chunk // batch))
    pieces = -(-length // piece)
    pad = -length % pieces

    def split(array):
        padded = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, -1, pieces, *array.shape[2:]), 2, 0)

    def body(total, inputs):
        hidden_piece, targets_piece, mask_piece = inputs
        loss, gradient = _chunk(hidden_piece, targets_piece, mask_piece, head, softcap, vocabulary_axis, with_gradient)
        return total + loss, gradient

    total, gradient = jax.lax.scan(body, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(mask)))
    if gradient is not None:
        gradient = jnp.moveaxis(gradient, 0, 2).reshape(batch, length + pad, width)[:, :length]
    return total, gradient


def _chunk(hidden, targets, mask, head, softcap, vocabulary_axis, with_gradient):
    def contract(x: Array, axis: int) -> Array:
        return jnp.tensordot(x, head.astype(hidden.dtype), ((-1,), (axis,)), preferred_element_type=jnp.float32)

    logits = contract(hidden, 1 - vocabulary_axis)
    capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    losses, log_normalizer = _token_losses(capped, targets)
    loss = jnp.sum(jnp.where(mask > 0, losses * mask, 0.0))
    if not with_gradient:
        return loss, None
    error = jnp.exp(capped - log_normalizer[..., None])
    error = error - jax.nn.one_hot(targets, error.shape[-1], dtype=error.dtype)
    if softcap is not None:
        error = error * (1.0 - jnp.square(capped / softcap))
    gradient = contract(error.astype(hidden.dtype), vocabulary_axis)
    weight = mask[..., None]  # here, on D numbers a token, rather than on the V of its error
    return loss, jnp.where(weight > 0, gradient * weight, 0.0).astype(hidden.dtype)
