"""Text from a causal decoder: one pass over the prompts, then one token a step out of the key-value cache.

The whole of it is one compiled function: prompts are padded on the left to one length, the cache has its final size
from the start, and a `lax.while_loop` ends when every row has met an end token. Another batch of the same shape,
another non-zero temperature or another key compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# (variables, cache, ids (B, S), positions (B, S), segment_ids (B, S)) -> logits (B, 1 or S, V), cache
ApplyFn = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class CachedForward:
    """The `ApplyFn` of a module with the decoder's call signature; equal modules share one compilation.

    A module that needs more arguments gets a class like this one. Frozen and hashable is the point: the function is a
    static argument of the compiled loop, and a fresh closure at each call would compile each time.
    """

    module: nn.Module

    def __call__(
        self, variables: Any, cache: Any, ids: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Logits of the last position, (B, 1, V), and the cache with these tokens in it."""
        logits, changed = self.module.apply(
            {**variables, "cache": cache}, ids, positions, segment_ids, decode=True, output="last", mutable=["cache"]
        )
        return logits, changed["cache"]


def top_p_filter(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits (B, V) with all tokens outside the nucleus at -inf (arXiv 1904.09751, section 3.1).

    The nucleus is the smallest set of most likely tokens whose probabilities sum to `top_p` or more, never empty.
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens that are more likely
    kept = (before < top_p).at[:, 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def sample(logits: jax.Array, key: jax.Array | None, temperature: jax.Array | float, top_p: jax.Array) -> jax.Array:
    """One token id a row, (B,) int32, from logits (B, V); the most likely one when `key` is None."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, top_p_filter(logits / temperature, top_p), axis=-1).astype(jnp.int32)


def generate(
    apply_fn: ApplyFn,
    variables: Any,
    cache: Any,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> jax.Array:
    """New tokens (B, max_new_tokens) int32; after a row's end token, which is included, come `pad_id`s.

    A row whose logits are not finite ends with -1 there, which is no token.

    Args:
      apply_fn: one cached step, see `ApplyFn`; `CachedForward(model)` for a plain decoder. Hashable: it is static.
      variables: its first argument, e.g. `{"params": params}`.
      cache: `init_cache(config, B, S + max_new_tokens)`.
      prompts: (B, S) int32, text at the right end.
      prompt_mask: (B, S), 1 on text, 0 on the padding at its left; every row has text in its last column.
      max_new_tokens: at least 1.
      temperature: 0 takes the most likely token; otherwise logits are divided by it before sampling.
      top_p: mass of the nucleus that is sampled from, in (0, 1].
      key: needed when temperature is not 0.
      eos_ids: tokens that end a row.
      pad_id: what follows an end.

    Raises:
      ValueError: an argument is out of range, or sampling without a key.
    """
    _check_generation(max_new_tokens, temperature, top_p, key)
    if prompts.shape != prompt_mask.shape:
        raise ValueError(f"prompts {prompts.shape} and prompt_mask {prompt_mask.shape} differ in shape")
    return _generate(
        apply_fn,
        max_new_tokens,
        variables,
        cache,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_mask, jnp.int32),
        jnp.float32(temperature),
        jnp.float32(top_p),
        key if temperature > 0 else None,
        jnp.asarray(tuple(eos_ids), jnp.int32),
        jnp.int32(pad_id),
    )


def _check_generation(max_new_tokens: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} samples and needs a key")


@partial(jax.jit, static_argnums=(0, 1))
def _generate(apply_fn, max_new_tokens, variables, cache, prompts, mask, temperature, top_p, key, eos_ids, pad_id):
    def draw(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        last = logits[:, -1]
        token = sample(last, None if key is None else jax.random.fold_in(key, step), temperature, top_p)
        largest = last.max(axis=-1) / (1 if key is None else temperature)
        return jnp.where(jnp.isfinite(largest), token, -1)  # the likeliest of NaNs would be token 0

    def ends(token: jax.Array) -> jax.Array:
        return (token[:, None] == eos_ids[None, :]).any(axis=-1) | (token < 0)

    def step(carry):
        number, token, position, done, tokens, cache = carry
        ones = jnp.ones_like(token)[:, None]
        logits, cache = apply_fn(variables, cache, token[:, None], position[:, None], ones)
        token = jnp.where(done, pad_id, draw(logits, number))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, axis=1)
        return number + 1, token, position + 1, done | ends(token), tokens, cache

    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits, cache = apply_fn(variables, cache, prompts, positions, mask)
    token = draw(logits, 0)
    tokens = jnp.full((prompts.shape[0], max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, mask.sum(axis=1), ends(token), tokens, cache)
    carry = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~c[3].all(), step, carry)
    return carry[4]
