"""Tiny random models of every supported family, made and saved by transformers; the oracle of this room."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mor_jax.models import Decoder, DecoderConfig, load_params, read_config

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(kind: str, **options: Any) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **options}}


# id -> (transformers' configuration class, what differs from _SIZES)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_mha_biased": ("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama_mqa_head_dim_24": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama_linear_rope": ("LlamaConfig", _rope("linear")),
    "llama3_rope": (
        "LlamaConfig",
        # of the twelve frequencies some are kept, some divided, some between
        {
            **_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
            "head_dim": 24,
        },
    ),
    "llama_yarn_rope": ("LlamaConfig", _rope("yarn", original_max_position_embeddings=8)),
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    "mistral_window": ("MistralConfig", {"sliding_window": 5}),
    "mistral_no_window": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_upper_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_mixed_window": (
        "Qwen3Config",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # caps and scalar small enough to matter for tiny logits
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    # no multiple of the pattern of five layers with a window and one without
    "gemma3_eight_layers": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 8,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "gemma3_capped_untied": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 4,
            "attention_bias": True,
            "final_logit_softcapping": 4.0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


@dataclass(frozen=True)
class Pair:
    """One model twice: transformers' and ours, read from the directory that transformers wrote."""

    name: str
    torch_model: Any
    directory: Any
    config: DecoderConfig
    params: dict
    forward: Any  # jitted (params, ids, positions, segment_ids) -> logits

    def logits(self, ids: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.forward(self.params, ids, positions, segment_ids))

    def torch_logits(self, ids: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None):
        import torch

        options = {
            name: torch.tensor(value)
            for name, value in (("attention_mask", mask), ("position_ids", positions))
            if value is not None
        }
        with torch.no_grad():
            return self.torch_model(torch.tensor(ids), **options).logits.numpy()


def jitted_forward(config: DecoderConfig):
    return jax.jit(lambda params, *inputs: Decoder(config).apply({"params": params}, *inputs))


def settings_of(name: str) -> Any:
    """transformers' configuration of a family."""
    import transformers

    kind, changes = FAMILIES[name]
    return getattr(transformers, kind)(**{**_SIZES, **changes})


def make_pair(name: str, directory) -> Pair:
    """Every parameter is random, norms and biases too, so that none can be swapped or lost unseen."""
    import torch
    import transformers

    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(settings_of(name), dtype=torch.float32).eval()
    norm_start = 0.0 if name.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(norm_start if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(directory)
    config = read_config(directory)
    return Pair(name, model, directory, config, load_params(directory, config), jitted_forward(config))


def loop_twin(pair: Pair) -> Pair:
    config = replace(pair.config, scan_layers=False)

    def forward(params, *inputs):  # not compiled: operation by operation, most of which the families share
        return Decoder(config).apply({"params": params}, *inputs)

    return replace(pair, config=config, params=load_params(pair.directory, config), forward=forward)
