"""Shapes of well-known checkpoints by name, as the fields of their `config.json`: a plan needs no weights."""

from __future__ import annotations

import difflib
from typing import Any

_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


def _llama(*sizes: int, **more: Any) -> dict:
    common = {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    return _shape(128256, *sizes, **(common | {"rope_scaling": _LLAMA_31_ROPE} | more))


def _qwen3(*sizes: int, **more: Any) -> dict:
    common = {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1000000.0, "max_position_embeddings": 40960}
    return _shape(151936, *sizes, **(common | more))


def _gemma3(*sizes: int, **more: Any) -> dict:
    common = {"model_type": "gemma3_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
    common |= {"head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256, "max_position_embeddings": 131072}
    return _shape(262208, *sizes, **(common | more))


_GEMMA3_ROPE = {"rope_type": "linear", "factor": 8.0}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, rope_scaling=_LLAMA_31_ROPE | {"factor": 32.0}
    ),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8),
    "mistral-7b": _shape(
        32768,
        4096,
        14336,
        32,
        32,
        8,
        model_type="mistral",
        rope_theta=1000000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    # the text models; the published sizes count the image encoder too
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, vocab_size=262144, sliding_window=512, max_position_embeddings=32768),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, rope_scaling=_GEMMA3_ROPE),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, rope_scaling=_GEMMA3_ROPE),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, rope_scaling=_GEMMA3_ROPE),
}


def preset(name: str) -> dict[str, Any] | None:
    """The `config.json` fields of the checkpoint called `name`, in any case, with or without its owner; or None."""
    found = PRESETS.get(name.lower().rsplit("/", 1)[-1])
    return None if found is None else dict(found)


def nearest_preset(name: str) -> str:
    """The known name that is most like `name`, or ""."""
    return next(iter(difflib.get_close_matches(name.lower(), PRESETS, n=1)), "")
