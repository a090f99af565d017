"""One bidirectional encoder for BERT, RoBERTa and MiniLM, told apart by `EncoderConfig` alone.

Parameter paths are those of Hugging Face with "/" for "." and the layer axis stacked in front:

    embeddings/{word,position,token_type}_embeddings/embedding   (rows, D)
    encoder/layer/attention/self/{query,key,value}/kernel        (L, D, D)
    encoder/layer/attention/output/dense/kernel                  (L, D, D)
    encoder/layer/{intermediate,output}/dense/kernel             (L, in, out)
    encoder/layer/{attention/output,output}/LayerNorm/{scale,bias}   (L, D)
    pooler/dense/kernel                                          (D, D), where there is a pooler
    classifier/kernel, or classifier/{dense,out_proj}/kernel     where there is a head

With `scan_layers=False` the layers are `encoder/layer_0`, `encoder/layer_1`, ... and their leaves have no layer axis.
Norms follow the residual (arXiv 1810.04805); nothing is dropped out: the base is frozen.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.models.attention import attend, default_positions
from mor_jax.models.config import EncoderConfig
from mor_jax.models.layers import ACTIVATION_FUNCTIONS, REMAT_POLICIES

OUTPUTS = ("logits", "hidden", "pooled", "embedding")


def _dense(config: EncoderConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def _norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name="LayerNorm",
    )


class Embeddings(nn.Module):
    """Words + positions + kinds of text, normed."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array, positions: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """(B, S) int32 each to (B, S, D)."""
        config = self.config

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(
                rows,
                config.hidden_size,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                embedding_init=nn.initializers.normal(config.initializer_range),
                name=name,
            )

        x = embed(config.vocab_size, "word_embeddings")(input_ids)
        x = x + embed(config.max_position_embeddings, "position_embeddings")(positions + config.position_offset)
        if config.type_vocab_size:
            x = x + embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        return _norm(config)(x)


class SelfAttention(nn.Module):
    """Multi-head attention without its output map; query, key and value read the identical array."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x (B, S, D) and mask (B, S, S) bool to (B, S, D)."""
        config = self.config
        heads = [_dense(config, config.hidden_size, name)(x) for name in ("query", "key", "value")]
        query, key, value = (h.reshape(*x.shape[:2], config.num_heads, -1) for h in heads)
        return attend(query, key, value, mask).reshape(x.shape)


class ResidualOutput(nn.Module):
    """LayerNorm(dense(x) + residual)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """x (B, S, in) and residual (B, S, D) to (B, S, D)."""
        return _norm(self.config)(_dense(self.config, self.config.hidden_size, "dense")(x) + residual)


class AttentionBlock(nn.Module):
    """Attention, its output map, residual and norm."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x (B, S, D) and mask (B, S, S) bool to (B, S, D)."""
        return ResidualOutput(self.config, name="output")(SelfAttention(self.config, name="self")(x, mask), x)


class Intermediate(nn.Module):
    """act(dense(x))."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, D) to (B, S, intermediate)."""
        return ACTIVATION_FUNCTIONS[self.config.hidden_act](
            _dense(self.config, self.config.intermediate_size, "dense")(x)
        )


class EncoderLayer(nn.Module):
    """Attention and MLP, each with a residual and a norm behind it."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Any], mask: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        """(x (B, S, D), extra) to ((x, extra), None): carry and output, as a scan wants them; extra is passed on."""
        x, carry_extra = carry
        x = AttentionBlock(self.config, name="attention")(x, mask)
        x = ResidualOutput(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x)
        return (x, carry_extra), None


class LayerStack(nn.Module):
    """All layers, scanned or looped."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, carry_extra: Any = None) -> jax.Array:
        """x (B, S, D) and mask (B, S, S) bool to (B, S, D)."""
        config, carry = self.config, (x, carry_extra)
        layer = EncoderLayer
        if config.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
        if not config.scan_layers:
            for number in range(config.num_layers):
                carry, _ = layer(config, name=f"layer_{number}")(carry, mask)
            return carry[0]
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # flax annotates the single form only
            length=config.num_layers,
        )
        return scanned(config, name="layer")(carry, mask)[0][0]


class Pooler(nn.Module):
    """tanh(dense(x)) of each text's first token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        """(B, D) to (B, D)."""
        return jnp.tanh(_dense(self.config, self.config.hidden_size, "dense")(first))


class DenseHead(nn.Module):
    """out_proj(tanh(dense(first token))), RoBERTa's head."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        """(B, D) to (B, classes)."""
        hidden = jnp.tanh(_dense(self.config, self.config.hidden_size, "dense")(first))
        return _dense(self.config, len(self.config.labels), "out_proj")(hidden)


def first_tokens(hidden: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The first token of each row that is no padding: (B, D) of hidden (B, S, D) and segment ids (B, S)."""
    index = jnp.argmax(segment_ids > 0, axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def mean_embedding(hidden: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Mean over the tokens of a row that are no padding, of length 1: (B, D) float32 (arXiv 1908.10084, section 3)."""
    mask = (segment_ids > 0).astype(jnp.float32)[..., None]
    mean = jnp.sum(hidden.astype(jnp.float32) * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


class Encoder(nn.Module):
    """A bidirectional encoder; one text a row for all outputs but "hidden".

    Example:
      >>> config = EncoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> variables = Encoder(config).init(jax.random.key(0), ids)
      >>> Encoder(config).apply(variables, ids, output="embedding").shape
      (1, 16)
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        output: str = "",
        carry_extra: Any = None,
    ) -> jax.Array:
        """What `output` names.

        Args:
          input_ids: (B, S) int32.
          positions: (B, S) int32 within the segment; None counts from each segment's first token.
          segment_ids: (B, S) int32, 0 = padding; tokens see those of their own segment only; None = one segment.
          token_type_ids: (B, S) int32, the kind of text (0 first sentence, 1 second); None = 0.
          output: "hidden", (B, S, D); "pooled", the pooler's (B, D); "embedding", the normed mean (B, D) float32;
            "logits", the head's (B, classes) float32. Empty: logits with a head, else hidden states.
          carry_extra: an opaque pytree that is threaded through the layers beside the hidden states.

        Raises:
          ValueError: unknown output, one that this model has no module for, or a row longer than the position table.
        """
        config = self.config
        output = output or ("hidden" if config.head == "none" else "logits")
        self._check(output, input_ids.shape[1], positions is None)
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        positions = default_positions(segment_ids) if positions is None else positions
        token_type_ids = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
        x = Embeddings(config, name="embeddings")(input_ids, positions, token_type_ids)
        x = LayerStack(config, name="encoder")(x, mask, carry_extra)
        first = first_tokens(x, segment_ids)
        pooled = logits = None
        if config.pooler and (self.is_initializing() or output == "pooled" or config.head == "linear"):
            pooled = Pooler(config, name="pooler")(first)
        if config.head == "linear" and (self.is_initializing() or output == "logits"):
            logits = _dense(config, len(config.labels), "classifier")(pooled)
        if config.head == "dense" and (self.is_initializing() or output == "logits"):
            logits = DenseHead(config, name="classifier")(first)
        found: dict[str, Any] = {"hidden": x, "pooled": pooled}
        if logits is not None:
            found["logits"] = logits.astype(jnp.float32)
        return mean_embedding(x, segment_ids) if output == "embedding" else found[output]

    def _check(self, output: str, length: int, counted: bool) -> None:
        config = self.config
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")
        if output == "logits" and config.head == "none":
            raise ValueError("output='logits' needs a classification head; this encoder has none")
        if output == "pooled" and not config.pooler:
            raise ValueError("output='pooled' needs a pooler; this encoder has none")
        if counted and length > config.max_length:
            raise ValueError(f"{length} tokens in a row, but the position table ends at {config.max_length}")
