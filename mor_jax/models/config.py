"""What a decoder or an encoder is made of, one frozen dataclass each.

A family (Llama, Qwen, Gemma, BERT, ...) is a set of values of these fields, never a branch in the model's code:
`hf_config.py` turns a `config.json` into a `DecoderConfig` or an `EncoderConfig` and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
HEADS = ("none", "linear", "dense")
ROPE_KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context length of pre-training.

    Raises:
      ValueError: unknown kind, or a value that the kind needs is missing or out of range.
    """

    kind: str  # "linear" (arXiv 2306.15595), "llama3" (Llama 3.1 release), "yarn" (arXiv 2309.00071)
    factor: float  # new context length / original one
    original_max_position_embeddings: int | None = None  # context length of pre-training (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by the factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high stay
    beta_fast: float = 32.0  # yarn: rotations over the original context above which a frequency stays
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is divided by the factor
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None = 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn: with mscale_all_dim, another attention factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope type {self.kind!r} is not supported; supported: default, {', '.join(ROPE_KINDS)}")
        if not self.factor > 0:
            raise ValueError(f"RopeScaling.factor must be positive, got {self.factor}")
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(f"rope type {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "yarn" and not (self.beta_fast > 0 and self.beta_slow > 0):
            raise ValueError(
                f"RopeScaling.beta_fast and beta_slow must be positive, got {self.beta_fast} and {self.beta_slow}"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"RopeScaling.high_freq_factor must exceed low_freq_factor, got {self.high_freq_factor} and "
                f"{self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and options of a causal decoder. Hashable, so that it may be a static argument of `jax.jit`.

    Example:
      >>> config = DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4)
      >>> config.num_kv_heads, config.head_dim, config.windows
      (4, 4, (None, None))

    Raises:
      ValueError: a field or a combination of fields is impossible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0  # 0 = num_heads; fewer = grouped-query attention
    head_dim: int = 0  # 0 = hidden_size / num_heads; need not be that
    max_position_embeddings: int = 2048  # advertised context length; nothing is cut at it
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation (Qwen 3)
    sliding_window: int | None = None  # keys at distance >= window are not seen
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window; () = all of them
    sliding_rope_theta: float | None = None  # rope of the layers with a window (Gemma 3); None = as all others
    sliding_rope_scaling: RopeScaling | None = None  # read only where sliding_rope_theta is set
    query_scalar: float | None = None  # attention scores are multiplied by its -1/2th power; None = head_dim
    attention_softcap: float | None = None  # scores become c * tanh(scores / c) before the mask (Gemma 2)
    logit_softcap: float | None = None  # the same for the final logits
    norm_unit_offset: bool = False  # RMS norms multiply by 1 + scale (Gemma)
    post_norms: bool = False  # attention and MLP have a norm behind them too, before the residual (Gemma 2)
    embedding_scale: float | None = None  # factor on embedded tokens, rounded to `dtype`; None = 1
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    model_type: str = "llama"  # the family's name in `config.json`; the model never reads it
    dtype: Any = "float32"  # of activations; norms and softmax are float32 always
    param_dtype: Any = "float32"
    scan_layers: bool = True  # one `nn.scan` (stacked leaves under "layers") or a loop ("layers_0", "layers_1", ...)
    attention_block: int = 512  # queries attended at a time in rows of two blocks or more; 0 = all at once
    attention_implementation: Literal["xla", "splash", "cudnn"] = "xla"  # see `models.fused_attention`
    remat: Literal["none", "dots", "full", "offload"] = "none"  # what the backward pass recomputes: see `models.layers`

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not divide by {self.num_heads} heads: set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"DecoderConfig.hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}"
            )
        choices = {"remat": ("none", "dots", "full", "offload"), "attention_implementation": ("xla", "splash", "cudnn")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"DecoderConfig.{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if self.attention_block < 0:
            raise ValueError(f"DecoderConfig.attention_block must be at least 0, got {self.attention_block}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"DecoderConfig.sliding_window must be at least 1, got {self.sliding_window}")
        for name in ("query_scalar", "attention_softcap", "logit_softcap", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"DecoderConfig.{name} must be positive, got {value}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"DecoderConfig.sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where a layer sees all earlier tokens."""
        slides = self.sliding_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if slide else None for slide in slides)

    @property
    def ropes(self) -> tuple[tuple[float, RopeScaling | None], ...]:
        """(theta, scaling) of each kind of layer: one, or unlimited layers first, those with a window second."""
        unlimited = (self.rope_theta, self.rope_scaling)
        if self.sliding_rope_theta is None:
            return (unlimited,)
        return unlimited, (self.sliding_rope_theta, self.sliding_rope_scaling)

    @property
    def rope_kinds(self) -> tuple[int, ...]:
        """For each layer the index of its rope in `ropes`."""
        return tuple(int(len(self.ropes) > 1 and window is not None) for window in self.windows)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and options of a bidirectional encoder. Hashable, so that it may be a static argument of `jax.jit`.

    Raises:
      ValueError: a field or a combination of fields is impossible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 512  # rows of the position table; a longer text is an error
    position_offset: int = 0  # the first token's row in that table (RoBERTa: padding id + 1)
    type_vocab_size: int = 2  # kinds of text that a token can belong to; 0 = no such table
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    pooler: bool = True  # tanh(dense(first token)) under "pooler"
    head: Literal["none", "linear", "dense"] = "none"  # over the pooler (BERT), or dense + tanh + out_proj (RoBERTa)
    labels: tuple[str, ...] = ()  # names of the classes; empty without a head
    model_type: str = "bert"  # the family's name in `config.json`; the model never reads it
    dtype: Any = "float32"  # of activations; norms and softmax are float32 always
    param_dtype: Any = "float32"
    scan_layers: bool = True  # one `nn.scan` (stacked leaves under "layer") or a loop ("layer_0", "layer_1", ...)
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: nothing, all but dots, all

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"EncoderConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide by {self.num_heads} heads")
        if self.max_length < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no place after "
                f"position_offset {self.position_offset}"
            )
        for name, choices in (("hidden_act", ACTIVATIONS), ("head", HEADS), ("remat", ("none", "dots", "full"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"EncoderConfig.{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if (self.head == "none") != (not self.labels):
            raise ValueError("EncoderConfig.labels must name the classes of a head, and be empty without one")
        if self.head == "linear" and not self.pooler:
            raise ValueError("EncoderConfig.head='linear' reads the pooler: set pooler=True")

    @property
    def max_length(self) -> int:
        """The most tokens of a text."""
        return self.max_position_embeddings - self.position_offset


ModelConfig = DecoderConfig | EncoderConfig
