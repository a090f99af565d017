"""Attention that never writes its scores to memory: a kernel for each kind of accelerator, from libraries we keep.

    splash    TPU: `jax.experimental.pallas.ops.tpu.splash_attention`; skips what lies above the diagonal or outside of
              a window, and masks other segments inside of the kernel
    cudnn     GPU: `jax.nn.dot_product_attention`; causal and window inside of the kernel, but segments of packed rows
              as a mask (B, 1, S, S) in memory, since jax has no public way to tell cuDNN where they begin

Both take the tokens of a segment to lie one after the other, as packed rows have them, and read who sees whom from
places in the row instead of positions. Padding attends to padding, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.models.config import DecoderConfig
from mor_jax.models.logical_axes import ALL_KEYS, QUERY_HEADS, split_ways

_LANES = 128  # tokens that a TPU's vector unit takes at once: blocks are multiples of it
_BLOCK = 512  # tokens of the largest block


def fusion_obstacle(config: DecoderConfig, length: int, parts: int = 1) -> str:
    """Why `config.attention_implementation` can't take rows of `length` tokens split into `parts`; "" if it can."""
    if config.attention_implementation == "splash":
        if length % (_LANES * parts) == 0:
            return ""
        return f"rows of {length} tokens are no multiple of {_LANES * parts}"
    if config.attention_implementation == "cudnn":
        if parts > 1:
            return "it does not split rows over a sequence axis"
        if config.attention_softcap is not None:
            return "it has no soft cap of the scores"
        if jnp.dtype(config.dtype) not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not in {jnp.dtype(config.dtype)}"
        if config.head_dim % 8 or config.head_dim > 128:
            return f"heads of {config.head_dim} are no multiple of 8 up to 128"
        return "rows have an odd number of tokens" if length % 2 else ""
    return "it is not fused"


def fused_attention(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: jax.Array | int | None,
) -> jax.Array:
    """Causal attention within segments, (B, S, N, H), where `fusion_obstacle` finds none.

    Args:
      config: names the implementation, the windows, the scale and the soft cap.
      query: (B, S, N, H).
      key: (B, S, K, H).
      value: (B, S, K, H).
      segment_ids: (B, S) int32, 0 = padding.
      window: of this layer; an array where a scan's layers differ, one of `config.windows` (None as the largest int32).
    """
    attend = _splash if config.attention_implementation == "splash" else _cudnn
    scale = (config.query_scalar or config.head_dim) ** -0.5
    attend = partial(attend, query, key, value, segment_ids, scale=scale, softcap=config.attention_softcap)
    return _with_static_window(attend, config.windows, window)


def _with_static_window(
    attend: Callable[..., jax.Array], windows: tuple[int | None, ...], window: jax.Array | int | None
) -> jax.Array:
    """`attend(window=...)` with a number that is known while tracing, as kernels need it."""
    if not isinstance(window, jax.Array):
        return attend(window=window)
    finite = sorted({own for own in windows if own is not None})
    choices = [*finite, None] if None in windows else finite
    if len(choices) == 1:
        return attend(window=choices[0])
    smaller = jnp.sum(window > jnp.asarray(finite, jnp.int32))
    return jax.lax.switch(smaller, [partial(lambda own: attend(window=own), own) for own in choices])


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    assert softcap is None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=segment_ids[:, None, :, None] == segment_ids[:, None, None, :],
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Each device attends with the queries and heads that it has; the compiler can't partition a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    heads, parts = query.shape[2] // split_ways("heads"), split_ways("length")
    kernel = _splash_kernel(heads, query.shape[1], parts, window, softcap, interpret)
    query = (query * scale).astype(query.dtype)
    if mesh.empty:
        return _splash_rows(kernel, query, key, value, segment_ids, segment_ids)
    length = logical_to_mesh_axes(("length",))
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, *(length or (None,)))))
    queries, keys = logical_to_mesh_axes(QUERY_HEADS), logical_to_mesh_axes(ALL_KEYS)
    rows = tuple(logical_to_mesh_axes(names) for names in (QUERY_HEADS[:2], ALL_KEYS[:2]))
    mapped = jax.shard_map(
        _splash_rows, mesh=mesh, in_specs=(kernel_spec, queries, keys, keys, *rows), out_specs=queries, check_vma=False
    )
    return mapped(kernel, query, key, value, segment_ids, segment_ids)


def _splash_rows(kernel, query, key, value, query_segments, key_segments):
    """(B, S', N', H): `kernel` for each row; it wants heads before tokens."""
    raised = jax.config.jax_default_matmul_precision not in (None, "default")  # pyright: ignore[reportAttributeAccessIssue]
    attend = _rows_as_they_are if raised and query.dtype != jnp.float32 else _rows
    return attend(kernel, query, key, value, query_segments, key_segments)


def _rows(kernel, query, key, value, query_segments, key_segments):
    from jax.experimental.pallas.ops.tpu import splash_attention

    heads_first = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    out = jax.vmap(kernel)(*heads_first, splash_attention.SegmentIds(query_segments, key_segments))
    return jnp.swapaxes(out, 1, 2)


@jax.custom_vjp
def _rows_as_they_are(kernel, query, key, value, query_segments, key_segments):
    """`_rows` where a context asks for more precision than bfloat16 has: the TPU's compiler then refuses the kernel.

    The products of such rows are exact in any case. The backward pass is traced later, so it says so itself.
    """
    with jax.default_matmul_precision("default"):
        return _rows(kernel, query, key, value, query_segments, key_segments)


def _rows_forward(kernel, query, key, value, query_segments, key_segments):
    with jax.default_matmul_precision("default"):
        return jax.vjp(
            lambda *own: _rows(kernel, own[0], own[1], own[2], query_segments, key_segments), query, key, value
        )


def _rows_backward(pullback, g):
    with jax.default_matmul_precision("default"):
        return None, *pullback(g), None, None


_rows_as_they_are.defvjp(_rows_forward, _rows_backward)


def _splash_kernel(heads: int, length: int, parts: int, window: int | None, softcap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention  # a second to import, and only a TPU needs it

    shape = (length, length)
    if window is None:
        mask = splash_attention.CausalMask(shape, shard_count=parts)
    else:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), offset=0, shard_count=parts)
    queries, keys = _block(length // parts), _block(length)
    blocks = splash_attention.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )


def _block(length: int) -> int:
    """The largest block of whole lanes that divides `length`."""
    return max(size for size in range(_LANES, _BLOCK + 1, _LANES) if length % size == 0)
