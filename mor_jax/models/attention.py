"""Rotary positions, masks and grouped-query attention with a key-value cache.

Who sees whom is told by two integers a token: its segment (0 = padding) and its position in that segment. A query
sees the keys of its own non-zero segment at positions up to its own, less than `window` away. Packed rows, padding on
either side and cached generation are therefore one rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint

from mor_jax.models.config import DecoderConfig, RopeScaling
from mor_jax.models.fused_attention import fused_attention, fusion_obstacle
from mor_jax.models.logical_axes import ALL_KEYS, KEY_HEADS, QUERY_HEADS, split_ways


class LayerKind(NamedTuple):
    """What tells one layer of a stack from another beside its parameters; scalars, or (L,) arrays for a scan."""

    window: jax.Array | int | None  # keys at this distance or more are not seen; None = no layer has a window
    rope: jax.Array | int | None  # index into `LayerInputs.cos`; None = all layers have one rope


class Tokens(NamedTuple):
    """What decides who sees whom, (B, S) int32 each."""

    positions: jax.Array  # within the segment
    segment_ids: jax.Array  # 0 = padding


class LayerInputs(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: jax.Array  # (K, B, S, head_dim / 2) float32, one table for each kind of rope
    sin: jax.Array  # (K, B, S, head_dim / 2) float32
    queries: Tokens  # (B, S)
    keys: Tokens  # (B, T); T slots with a cache
    cache_index: jax.Array | None  # () int32, first cache slot to write; None without a cache


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings or 0  # never None for this kind
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn_frequencies(frequencies: np.ndarray, theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    def dimension(rotations: float) -> float:
        original = scaling.original_max_position_embeddings or 0
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return frequencies / scaling.factor * (1 - keep) + frequencies * keep


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def rotary_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Angles per position, (head_dim / 2,) float32, and the factor on cos and sin (1 except for yarn)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = 1.0 / theta**exponents
    factor = 1.0
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, scaling)
    elif scaling is not None:
        frequencies = _yarn_frequencies(frequencies, theta, head_dim, scaling)
        factor = _yarn_attention_factor(scaling)
    return frequencies.astype(np.float32), factor


def rotary_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of positions (B, S), each (K, B, S, head_dim / 2) float32 (arXiv 2104.09864, eq. 34).

    K is the number of `config.ropes`.
    """
    found = [rotary_frequencies(theta, config.head_dim, scaling) for theta, scaling in config.ropes]
    frequencies = np.stack([frequencies for frequencies, _ in found])[:, None, None, :]
    factors = np.array([factor for _, factor in found], np.float32)[:, None, None, None]
    angles = positions[None, ..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factors, jnp.sin(angles) * factors


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads x (B, S, N, H) turned by their positions; the pairs are (i, i + H / 2), as in Hugging Face files."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def default_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 where a new segment begins: (B, S) int32 for segment ids (B, S)."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jnp.where(segment_ids > 0, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1), 0)


def visible(queries: Tokens, keys: Tokens, window: jax.Array | int | None = None) -> jax.Array:
    """(B, S, T) bool: same non-zero segment, key not later than query and, with a window, less than that away."""
    same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return same & near & (keys.segment_ids > 0)[:, None, :]


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """c * tanh(x / c): x held within (-c, c) (arXiv 2408.00118, section 2); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scalar: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention, (B, S, N, H) in the dtype of `value`; scores and softmax in float32.

    Args:
      query: (B, S, N, H).
      key: (B, T, K, H) with N a multiple of K; query head n reads key head n // (N / K) (arXiv 2305.13245).
      value: (B, T, K, H).
      mask: (B, S, T) bool. A query that sees nothing (padding) gets a finite average that nobody reads.
      scalar: scores are multiplied by its -1/2th power; None = H.
      softcap: of the scores, before the mask; None = none.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgh,btkh->bkgst", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * (scalar or head_dim) ** -0.5, softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights, value).reshape(batch, length, heads, head_dim)


def attend_in_blocks(
    query: jax.Array,
    queries: Tokens,
    keys: Tokens,
    window: jax.Array | int | None,
    block: int,
    attend: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`attend(query, mask)` for `block` queries at a time, so that no scores and no mask of a long row are all alive.

    The backward pass computes each block's scores again. Queries of a block are evenly spaced along the row: where a
    mesh splits the row, each device has its share of every block.

    Args:
      query: (B, S, N, H).
      queries: (B, S).
      keys: (B, T).
      window: of `visible`.
      block: queries at a time; 0, or rows of less than two blocks, attends at once.
      attend: of (B, S', N, H) and a mask (B, S', T).
    """
    length = query.shape[1]
    if not block or length < 2 * block:
        return attend(query, visible(queries, keys, window))
    count = -(-length // block)
    pad = -length % count

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, count, *array.shape[2:]), 2, 0)

    def one(inputs: tuple[jax.Array, Tokens]) -> jax.Array:
        return attend(inputs[0], visible(inputs[1], keys, window))

    out = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (split(query), Tokens(*map(split, queries))))
    return jnp.moveaxis(out, 0, 2).reshape(query.shape[0], length + pad, *query.shape[2:])[:, :length]


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), computed in float32, returned in `config.dtype`.

    With `config.norm_unit_offset` the factor is 1 + scale, and a fresh scale is 0.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D)."""
        offset = self.config.norm_unit_offset
        start = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.config.param_dtype).astype(jnp.float32) + float(offset)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x * scale).astype(self.config.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention; q_proj, k_proj and v_proj read the identical array."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, inputs: LayerInputs, kind: LayerKind) -> jax.Array:
        """x (B, S, D) to (B, S, D)."""
        config = self.config
        dense = partial(
            nn.Dense,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
        )
        kv_width = config.num_kv_heads * config.head_dim
        query = dense(config.num_heads * config.head_dim, use_bias=config.qkv_bias, name="q_proj")(x)
        key = dense(kv_width, use_bias=config.qkv_bias, name="k_proj")(x)
        value = dense(kv_width, use_bias=config.qkv_bias, name="v_proj")(x)
        query, key, value = (
            with_logical_constraint(t.reshape(*x.shape[:2], -1, config.head_dim), axes)
            for t, axes in ((query, QUERY_HEADS), (key, KEY_HEADS), (value, KEY_HEADS))
        )
        if config.qk_norm:
            query, key = RMSNorm(config, name="q_norm")(query), RMSNorm(config, name="k_norm")(key)
        cos, sin = (table[0 if kind.rope is None else kind.rope] for table in (inputs.cos, inputs.sin))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if inputs.cache_index is not None:
            key, value = self._cached("key", key, inputs.cache_index), self._cached("value", value, inputs.cache_index)
        key, value = with_logical_constraint(key, ALL_KEYS), with_logical_constraint(value, ALL_KEYS)
        out = self._attend(query, key, value, inputs, kind)
        out = with_logical_constraint(out, QUERY_HEADS).reshape(*x.shape[:2], -1)
        return dense(config.hidden_size, use_bias=config.o_bias, name="o_proj")(out)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, inputs: LayerInputs, kind: LayerKind):
        """By the kernel of the configuration; short or odd rows, and all with a cache, by blocks of queries."""
        config = self.config
        if inputs.cache_index is None and not fusion_obstacle(config, query.shape[1], split_ways("length")):
            return fused_attention(config, query, key, value, inputs.queries.segment_ids, kind.window)

        def attend_some(query: jax.Array, mask: jax.Array) -> jax.Array:
            return attend(query, key, value, mask, config.query_scalar, config.attention_softcap)

        return attend_in_blocks(query, inputs.queries, inputs.keys, kind.window, config.attention_block, attend_some)

    def _cached(self, name: str, new: jax.Array, index: jax.Array) -> jax.Array:
        """The cache (B, T, K, H) with `new` (B, S, K, H) written from slot `index` on."""
        cache = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new.astype(cache.value.dtype), index, axis=1)
        return cache.value
