"""Next-token cross-entropy that never holds more than a chunk of logits.

With T tokens, width D and vocabulary V, the logits of a batch are T x V floats: more than everything else in memory.
Here `lax.scan` walks over pieces of them, and because the head is frozen the gradient of the hidden states,

    d loss / d hidden = mask * (softmax(hidden @ head) - onehot(target)) @ head.T,

is computed in the same pass while the piece's logits are alive: the backward pass only multiplies it by a scalar.

There are two walks, and `vocabulary_block` chooses by shape. Over chunks of tokens, the head is read twice a chunk.
Over blocks of the vocabulary, it is read twice in all: softmax(hidden @ head) @ head.T is attention of the tokens to
the vocabulary, so its softmax can be summed as flash attention does (arXiv 2205.14135, algorithm 1).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

LARGEST_BLOCK = 4096  # entries of the vocabulary; larger ones were no faster and hold more memory
SMALLEST_BLOCK = 2048  # below it, carrying T x D sums from block to block costs more than reading the head again
LANES = 128  # blocks are a multiple of it


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
    block: int | None = None,
) -> tuple[Array, Array]:
    """`cross_entropy` of `hidden @ head` with at most `chunk` x V logits alive; no gradient reaches `head`.

    Args:
      hidden: (B, S, D), the final hidden states.
      head: (D, V), or (V, D) with `vocabulary_axis` 0; frozen. It is read as it lies, without a transposed copy.
      targets: (B, S) int32.
      mask: (B, S), 1 where a target counts.
      chunk: tokens whose logits are alive at a time.
      softcap: c of c * tanh(logits / c), or None.
      vocabulary_axis: of `head`.
      block: entries of the vocabulary whose logits are alive at a time, of all tokens; 0 walks over chunks of tokens
        instead, None takes `vocabulary_block`.

    Returns:
      (loss_sum, token_count), float32 scalars.
    """
    mask = mask.astype(jnp.float32)
    if block is None:
        block = vocabulary_block(targets.size, head.shape[vocabulary_axis], chunk)
    return _chunked(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis), jnp.sum(mask)


def vocabulary_block(tokens: int, vocabulary: int, chunk: int) -> int:
    """Entries of the vocabulary in a block, or 0 where chunks of tokens are better.

    They are where the head is split over devices, which hold blocks of it already, where all fits in one chunk or
    block, and where there are so many tokens that blocks of `chunk` x V logits would be narrow.

    Args:
      tokens: T.
      vocabulary: V.
      chunk: T x block is at most `chunk` x V.
    """
    largest = min(LARGEST_BLOCK, chunk * vocabulary // tokens)
    split = jax.sharding.get_abstract_mesh().size > 1
    if split or largest < SMALLEST_BLOCK or largest >= vocabulary:
        return 0
    pieces = -(-vocabulary // (largest - largest % LANES))
    return -(-vocabulary // (pieces * LANES)) * LANES


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _chunked(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis) -> Array:
    return _walk(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis, with_gradient=False)[0]


def _chunked_forward(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis):
    return _walk(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis, with_gradient=True)


def _chunked_backward(chunk, block, softcap, vocabulary_axis, gradient, cotangent):
    return (gradient * cotangent).astype(gradient.dtype), None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _walk(hidden, head, targets, mask, chunk, block, softcap, vocabulary_axis, with_gradient):
    """(loss sum, gradient of hidden (B, S, D) or None)."""
    if block:
        return _scan_vocabulary(hidden, head, targets, mask, block, softcap, vocabulary_axis, with_gradient)
    return _scan_chunks(hidden, head, targets, mask, chunk, softcap, vocabulary_axis, with_gradient)


def _token_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log p(target) (...) and log sum exp (...) of float32 logits (..., V)."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_normalizer - chosen, log_normalizer


def _contract(x: Array, head: Array, axis: int) -> Array:
    """The float32 sum of products over the last axis of `x` and an axis of `head`, which is read in `x`'s dtype."""
    return jnp.tensordot(x, head.astype(x.dtype), ((-1,), (axis,)), preferred_element_type=jnp.float32)


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
    logits = _contract(hidden, head, 1 - vocabulary_axis)
    capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    losses, log_normalizer = _token_losses(capped, targets)
    loss = jnp.sum(jnp.where(mask > 0, losses * mask, 0.0))
    if not with_gradient:
        return loss, None
    error = jnp.exp(capped - log_normalizer[..., None])
    error = error - jax.nn.one_hot(targets, error.shape[-1], dtype=error.dtype)
    if softcap is not None:
        error = error * (1.0 - jnp.square(capped / softcap))
    gradient = _contract(error.astype(hidden.dtype), head, vocabulary_axis)
    weight = mask[..., None]  # here, on D numbers a token, rather than on the V of its error
    return loss, jnp.where(weight > 0, gradient * weight, 0.0).astype(hidden.dtype)


def _scan_vocabulary(hidden, head, targets, mask, block, softcap, vocabulary_axis, with_gradient):
    """(loss sum, gradient of hidden (B, S, D) or None).

    Of each token a scan carries m, the largest logit so far, sum_v exp(l_v - m) and sum_v exp(l_v - m) l'_v head_v,
    where l' is the slope of the cap. The target is left out of both sums and comes in at the end,

        d loss / d hidden = (sum_v exp(l_v - m) l'_v head_v - (sum_v exp(l_v - m)) l'_target head_target) / normalizer,

    so that a target of probability nearly 1 is no difference of two nearly equal numbers.
    """
    shape, vocabulary = hidden.shape, head.shape[vocabulary_axis]
    block = min(block, vocabulary)
    hidden, targets, mask = hidden.reshape(-1, shape[-1]), targets.reshape(-1), mask.reshape(-1)
    own = jnp.moveaxis(jnp.take(head, targets, axis=vocabulary_axis), vocabulary_axis, 0).astype(hidden.dtype)
    own_logit, own_slope = _cap(jnp.einsum("td,td->t", hidden, own, preferred_element_type=jnp.float32), softcap)

    def body(carry, start):
        peak, others, pull = carry
        first = jnp.minimum(start, vocabulary - block)  # the last block begins early, rather than being padded
        rows = jax.lax.dynamic_slice_in_dim(head, first, block, vocabulary_axis)
        logits, slope = _cap(_contract(hidden, rows, 1 - vocabulary_axis), softcap)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        entries = first + jnp.arange(block)
        counted = (entries != targets[:, None]) & (entries >= start)
        weights = jnp.where(counted, jnp.exp(logits - new_peak[:, None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        others = others * shrink + jnp.sum(weights, axis=-1)
        if pull is not None:
            pull = pull * shrink[:, None] + _contract((weights * slope).astype(hidden.dtype), rows, vocabulary_axis)
        return (new_peak, others, pull), None

    pull = jnp.zeros(hidden.shape, jnp.float32) if with_gradient else None
    start = (own_logit, jnp.zeros_like(own_logit), pull)
    (peak, others, pull), _ = jax.lax.scan(body, start, jnp.arange(0, vocabulary, block))
    normalizer = others + jnp.exp(own_logit - peak)
    losses = jnp.log(normalizer) + peak - own_logit
    loss = jnp.sum(jnp.where(mask > 0, losses * mask, 0.0))
    if pull is None:
        return loss, None
    scale = mask / normalizer
    gradient = (pull - (others * own_slope)[:, None] * own) * scale[:, None]
    return loss, jnp.where(mask[:, None] > 0, gradient, 0.0).astype(hidden.dtype).reshape(shape)


def _cap(logits: Array, softcap: float | None) -> tuple[Array, Array | float]:
    """The capped logits and the slope of the cap there."""
    if softcap is None:
        return logits, 1.0
    shape = jnp.tanh(logits / softcap)
    return softcap * shape, 1.0 - jnp.square(shape)
