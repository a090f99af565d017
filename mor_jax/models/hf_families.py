"""What tells one family's `config.json` from another's: one row of `FAMILIES` each.

Defaults, and which fields a family has, are those of its configuration class in transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from Llama."""

    architecture: str  # the class name that Hugging Face files carry
    defaults: dict[str, Any] = field(default_factory=dict)  # values where `config.json` is silent
    nullable: tuple[str, ...] = ()  # sizes and rates that may be null
    bias_fields: dict[str, Any] = field(default_factory=dict)  # ours -> name of the JSON flag, or a fixed bool
    window: str = (
        "none"  # "all" layers, "upper" (from max_window_layers on, when use_sliding_window), "pattern", "none"
    )
    fixed: dict[str, Any] = field(default_factory=dict)  # our fields that are so in the whole family
    query_scalar: bool = False  # the file has query_pre_attn_scalar
    caps: dict[str, str] = field(default_factory=dict)  # ours -> JSON name of a soft cap
    refused: tuple[str, ...] = ()  # JSON fields that must be absent, null or false
    unread: tuple[str, ...] = ()  # JSON fields of the family that transformers' model does not read
    activation: str = "hidden_act"  # JSON name of the activation
    scaled_embedding: bool = False  # embedded tokens are multiplied by hidden_size^1/2
    sliding_rope: str = ""  # JSON name of the rope theta of layers with a window
    initializer_limit: float = math.inf  # the most that initializer_range may be
    divided: bool = False  # hidden_size must divide by the heads even where head_dim is set

    @property
    def names(self) -> frozenset[str]:
        """The JSON fields that are read."""
        flags = [flag for flag in self.bias_fields.values() if isinstance(flag, str)]
        scalar = ["query_pre_attn_scalar"] if self.query_scalar else []
        sliding = [self.sliding_rope] if self.sliding_rope else []
        read = [*flags, *scalar, *sliding, *self.caps.values(), *self.refused, self.activation]
        return frozenset([*_READ, *_WINDOW_FIELDS[self.window], *read])


_READ = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
)
_WINDOW_FIELDS = {
    "none": ("layer_types",),
    "all": ("layer_types", "sliding_window"),
    "upper": ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    "pattern": ("layer_types", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern"),
}
_GEMMA = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "sliding_window": 4096,
}
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048},
        nullable=("num_key_value_heads", "head_dim", "attention_dropout"),
        bias_fields={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        initializer_limit=1.0,
        divided=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        nullable=("head_dim",),
        window="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        nullable=("num_key_value_heads",),
        bias_fields={"qkv_bias": True},
        window="upper",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128},
        nullable=("num_key_value_heads",),
        bias_fields={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        fixed={"qk_norm": True},
        window="upper",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        nullable=("attention_dropout",),
        bias_fields=_GEMMA_BIASES,
        window="pattern",
        fixed={"norm_unit_offset": True, "post_norms": True},
        query_scalar=True,
        caps={"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        refused=("use_bidirectional_attention",),
        activation="hidden_activation",
        scaled_embedding=True,
        divided=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        nullable=("attention_dropout",),
        bias_fields=_GEMMA_BIASES,
        window="pattern",
        fixed={"norm_unit_offset": True, "post_norms": True, "qk_norm": True},
        query_scalar=True,
        caps={"logit_softcap": "final_logit_softcapping"},
        refused=("use_bidirectional_attention",),
        unread=("attn_logit_softcapping",),
        activation="hidden_activation",
        scaled_embedding=True,
        sliding_rope="rope_local_base_freq",
        divided=True,
    ),
}
