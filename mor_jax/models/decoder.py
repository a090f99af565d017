"""One causal decoder for Llama, Mistral, Qwen, SmolLM and Gemma, told apart by `DecoderConfig` alone.

Parameter paths are those of Hugging Face with "/" for "." and the layer axis stacked in front:

    embed_tokens/embedding                        (V, D)
    layers/input_layernorm/scale                  (L, D), and the family's other norms
    layers/self_attn/{q,k,v,o}_proj/kernel        (L, in, out)
    layers/mlp/{gate,up,down}_proj/kernel         (L, in, out)
    norm/scale                                    (D,)
    lm_head/kernel                                (D, V), absent when tied

With `scan_layers=False` the layers are `layers_0`, `layers_1`, ... and their leaves have no layer axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jax.ad_checkpoint import checkpoint_name

from mor_jax.models.attention import (
    Attention,
    LayerInputs,
    LayerKind,
    RMSNorm,
    Tokens,
    default_positions,
    rotary_tables,
    soft_cap,
)
from mor_jax.models.config import DecoderConfig
from mor_jax.models.layers import ACTIVATION_FUNCTIONS, LAYER_INPUT, REMAT_POLICIES
from mor_jax.models.logical_axes import INNER, LOOKED_UP, LOOKED_UP_IDS, RESIDUAL, TABLE

_NO_WINDOW = jnp.iinfo(jnp.int32).max  # the window of an unlimited layer among limited ones
_float32_dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6); gate_proj and up_proj read the identical array."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, D) to (B, S, D)."""
        config = self.config
        dense = partial(
            nn.Dense,
            use_bias=config.mlp_bias,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
        )
        gate = dense(config.intermediate_size, name="gate_proj")(x)
        up = dense(config.intermediate_size, name="up_proj")(x)
        inner = with_logical_constraint(ACTIVATION_FUNCTIONS[config.hidden_act](gate) * up, INNER)
        return dense(config.hidden_size, name="down_proj")(inner)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual; with `post_norms` each in front of one too."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], kind: LayerKind, inputs: LayerInputs
    ) -> tuple[tuple[jax.Array, Any], None]:
        """(x (B, S, D), extra) to ((x, extra), None): carry and output, as a scan wants them; extra is passed on."""
        config, (x, carry_extra) = self.config, carry
        x = checkpoint_name(x, LAYER_INPUT)
        attended = RMSNorm(config, name="input_layernorm")(x)
        attended = Attention(config, name="self_attn")(attended, inputs, kind)
        if config.post_norms:
            attended = RMSNorm(config, name="post_attention_layernorm")(attended)
        x = with_logical_constraint(x + attended, RESIDUAL)
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        transformed = MLP(config, name="mlp")(RMSNorm(config, name=before_mlp)(x))
        if config.post_norms:
            transformed = RMSNorm(config, name="post_feedforward_layernorm")(transformed)
        return (with_logical_constraint(x + transformed, RESIDUAL), carry_extra), None


class Decoder(nn.Module):
    """A causal language model.

    Example:
      >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> variables = Decoder(config).init(jax.random.key(0), ids)
      >>> Decoder(config).apply(variables, ids).shape
      (1, 3, 32)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        decode: bool = False,
        output: str = "logits",
        carry_extra: Any = None,
    ) -> jax.Array:
        """Logits (B, S, V) float32, or hidden states.

        Args:
          input_ids: (B, S) int32.
          positions: (B, S) int32 within the segment; None counts from each segment's first token.
          segment_ids: (B, S) int32, 0 = padding; tokens see earlier ones of their own segment only; None = one segment.
          decode: read and write the "cache" collection (see `init_cache`, pass `mutable=["cache"]`).
          output: "logits"; "last" for the logits of the last position alone, (B, 1, V); "hidden" for the final-normed
            hidden states (B, S, D), which times `head_kernel` are the logits (before `logit_softcap`).
          carry_extra: an opaque pytree that is threaded through the layers beside the hidden states.

        Raises:
          ValueError: unknown output, or `decode` without a cache.
        """
        if output not in ("logits", "last", "hidden"):
            raise ValueError(f"output must be logits, last or hidden; got {output!r}")
        config = self.config
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        inputs = self._layer_inputs(positions, segment_ids, decode)
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(config.initializer_range),
            name="embed_tokens",
        )
        x = _look_up(embed.embedding, input_ids).astype(config.dtype)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        x = self._layers((x, carry_extra), inputs)
        x = RMSNorm(config, name="norm")(x[:, -1:] if output == "last" else x)
        if output == "hidden" and not (self.is_initializing() and not config.tie_word_embeddings):
            return x
        logits = soft_cap(self._logits(x, embed), config.logit_softcap)
        return x if output == "hidden" else logits

    def _layer_inputs(self, positions: jax.Array | None, segment_ids: jax.Array, decode: bool) -> LayerInputs:
        """What all layers share; with `decode`, the positions and segments of these tokens enter the cache."""
        index = self._cache_index() if decode else None
        if positions is None:
            positions = default_positions(segment_ids) + (0 if index is None else index)
        positions = jnp.asarray(positions, jnp.int32)
        queries = Tokens(positions, segment_ids)
        keys = self._cache_keys(index, queries) if decode else queries
        return LayerInputs(*rotary_tables(self.config, positions), queries, keys, index)

    def _layers(self, carry: tuple[jax.Array, Any], inputs: LayerInputs) -> jax.Array:
        config = self.config
        layer = DecoderLayer
        if config.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for number, kind in enumerate(map(LayerKind, config.windows, config.rope_kinds)):
                carry, _ = layer(config, name=f"layers_{number}")(carry, kind, inputs)
            return carry[0]
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # flax annotates the single form only
            length=config.num_layers,
        )
        windows = jnp.asarray([_NO_WINDOW if w is None else w for w in config.windows], jnp.int32)
        ropes = jnp.asarray(config.rope_kinds, jnp.int32)
        windowed = any(window is not None for window in config.windows)
        kinds = LayerKind(windows if windowed else None, ropes if len(config.ropes) > 1 else None)
        return scanned(config, name="layers")(carry, kinds, inputs)[0][0]

    def _logits(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        config = self.config
        if config.tie_word_embeddings:
            table = embed.embedding.astype(config.dtype)
            return jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
        return nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            kernel_init=nn.initializers.normal(config.initializer_range),
            dot_general=_float32_dot,
            name="lm_head",
        )(x).astype(jnp.float32)

    def _cache_index(self) -> jax.Array:
        if not self.has_variable("cache", "index"):
            raise ValueError(
                'decode=True needs a cache: add {"cache": init_cache(config, batch, length)} to the variables'
            )
        return self.get_variable("cache", "index")

    def _cache_keys(self, index: Any, queries: Tokens) -> Tokens:
        """Positions and segments of all cache slots, (B, T) each, after this call's tokens are entered."""
        written = []
        for name, new in queries._asdict().items():
            slots = jax.lax.dynamic_update_slice_in_dim(self.get_variable("cache", name), new, index, axis=1)
            self.put_variable("cache", name, slots)
            written.append(slots)
        self.put_variable("cache", "index", index + queries.positions.shape[1])
        return Tokens(*written)


def init_cache(config: DecoderConfig, batch_size: int, length: int) -> dict:
    """An empty key-value cache for `length` tokens a row: the "cache" collection of `Decoder.apply(..., decode=True)`.

    Keys and values are (L, B, length, num_kv_heads, head_dim) in `config.dtype` (without L for loop layers).
    """
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)

    def slots(*leading: int) -> dict:
        return {"self_attn": {name: jnp.zeros((*leading, *shape), config.dtype) for name in ("key", "value")}}

    layers = {"layers": slots(config.num_layers)}
    if not config.scan_layers:
        layers = {f"layers_{number}": slots() for number in range(config.num_layers)}
    return {
        "index": jnp.zeros((), jnp.int32),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
        **layers,
    }


def _look_up(table: jax.Array, input_ids: jax.Array) -> jax.Array:
    """Rows (B, S, D) of the table (V, D), held to a way on which no device has all of the table or of the rows."""
    with jax.named_scope("embed_tokens"):
        rows = jnp.take(_by_width(table), with_logical_constraint(input_ids, LOOKED_UP_IDS), axis=0)
        for axes in LOOKED_UP:
            rows = with_logical_constraint(rows, axes)
        return rows


@jax.custom_vjp
def _by_width(table: jax.Array) -> jax.Array:
    """The table split along its width alone; its gradient, where it is trained, is held to nothing."""
    return with_logical_constraint(table, TABLE)


_by_width.defvjp(lambda table: (_by_width(table), None), lambda _, gradient: (gradient,))


class HeadKernel(NamedTuple):
    """The output matrix as it lies in memory; a transposed copy of it would be as large as itself."""

    kernel: jax.Array  # (D, V) or (V, D)
    vocabulary_axis: int  # 1 or 0


def head_kernel(params: dict, config: DecoderConfig) -> HeadKernel:
    """`lm_head/kernel` (D, V), or the embedding (V, D) when tied."""
    if config.tie_word_embeddings:
        return HeadKernel(params["embed_tokens"]["embedding"], 0)
    return HeadKernel(params["lm_head"]["kernel"], 1)
