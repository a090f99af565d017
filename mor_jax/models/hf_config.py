"""`config.json` of Hugging Face to `DecoderConfig` or `EncoderConfig` and back.

A family is one row of `FAMILIES`: the values that its files may leave out, and which projections carry a bias. The file
is read as plain JSON: no class named in it is imported, no code beside it is run.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig, RopeScaling
from mor_jax.models.hf_encoder import ENCODER_FAMILIES, encoder_to_hf, parse_encoder
from mor_jax.models.hf_json import JsonReader, ModelFileError, read_json
from mor_jax.models.presets import PRESETS, nearest_preset, preset


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from Llama."""

    architecture: str  # the class name that Hugging Face files carry
    defaults: dict[str, Any] = field(default_factory=dict)  # values where `config.json` is silent
    bias_fields: dict[str, Any] = field(default_factory=dict)  # ours -> name of the JSON flag, or a fixed bool
    window: str = (
        "none"  # "all" layers, "upper" (from max_window_layers on, when use_sliding_window), "pattern", "none"
    )
    fixed: dict[str, Any] = field(default_factory=dict)  # our fields that are so in the whole family
    positive: dict[str, str] = field(default_factory=dict)  # ours -> JSON name of a number that may be null
    refused: tuple[str, ...] = ()  # JSON fields that must be absent, null or false
    activation: str = "hidden_act"  # JSON name of the activation
    scaled_embedding: bool = False  # embedded tokens are multiplied by hidden_size^1/2
    sliding_rope: str = ""  # JSON name of the rope theta of layers with a window


_GEMMA = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_QWEN = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048},
        bias_fields={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        window="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        bias_fields={"qkv_bias": True},
        window="upper",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128},
        bias_fields={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        fixed={"qk_norm": True},
        window="upper",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        bias_fields=_GEMMA_BIASES,
        window="pattern",
        fixed={"norm_unit_offset": True, "post_norms": True},
        positive={
            "query_scalar": "query_pre_attn_scalar",
            "attention_softcap": "attn_logit_softcapping",
            "logit_softcap": "final_logit_softcapping",
        },
        refused=("use_bidirectional_attention",),
        activation="hidden_activation",
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        bias_fields=_GEMMA_BIASES,
        window="pattern",
        fixed={"norm_unit_offset": True, "post_norms": True, "qk_norm": True},
        positive={"query_scalar": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"},
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),  # Hugging Face reads neither as written
        activation="hidden_activation",
        scaled_embedding=True,
        sliding_rope="rope_local_base_freq",
    ),
}
_ROPE_FIELDS = {
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "truncate": bool,
}
_ROPE_IGNORED = {"rope_type", "type", "factor", "rope_theta", "partial_rotary_factor"}


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The `DecoderConfig` or `EncoderConfig` that `directory/config.json` describes.

    Both spellings of rotary settings are read (`rope_theta` + `rope_scaling`, and `rope_parameters`). A file that says
    bfloat16 gives bfloat16 for `dtype` and `param_dtype`, any other float32; `dataclasses.replace` changes either.

    Raises:
      ModelFileError: the file is missing, a field is missing or malformed, or the model is of an unsupported kind
        (family, rope type, activation, quantised weights); the message names file and field.
    """
    path = Path(directory) / "config.json"
    return _parse(path, read_json(path))


def known_config(model: str | os.PathLike) -> ModelConfig:
    """The config of a model directory, of a lone `config.json`, or of a well-known checkpoint by name.

    Raises:
      ModelFileError: as `read_config`, or nothing is there under that name.
    """
    path = Path(model)
    if path.is_file():
        return _parse(path, read_json(path))
    if path.is_dir():
        return read_config(path)
    fields = preset(str(model))
    if fields is None:
        near = nearest_preset(str(model))
        hint = f"; did you mean {near}?" if near else ""
        raise ModelFileError(
            f"{model}: no model directory, no config.json, and no known name; known are {', '.join(PRESETS)}{hint}"
        )
    return _parse(path, fields)


def same_model(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether the two describe one function of the same weights; dtypes, scan, remat and blocks do not count."""

    def plain(config: ModelConfig) -> ModelConfig:
        how: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "scan_layers": True, "remat": "none"}
        if isinstance(config, DecoderConfig):
            how |= {"sliding_window": None, "sliding_layers": (), "attention_block": 0}
            how |= {"attention_implementation": "xla"}
        return replace(config, **how)

    windows = [config.windows if isinstance(config, DecoderConfig) else () for config in (first, second)]
    return windows[0] == windows[1] and plain(first) == plain(second)


def _parse(path: Path, values: dict[str, Any]) -> ModelConfig:
    model_type = values.get("model_type")
    known = [*FAMILIES, *ENCODER_FAMILIES]
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelFileError(
            f"{path}: field 'model_type' is {model_type!r}; supported: {', '.join(sorted(known))}{hint}"
        )
    if values.get("quantization_config"):
        raise JsonReader(path, values, {}).fail(
            "quantization_config", "is set; quantised weights are not supported, use a float checkpoint"
        )
    if model_type in ENCODER_FAMILIES:
        return parse_encoder(path, values)
    family = FAMILIES[model_type]
    reader = JsonReader(path, values, family.defaults)
    for name in family.refused:
        if values.get(name):
            raise reader.fail(name, f"is {values[name]!r}, which is not supported; supported is null or false")
    fields = {**_sizes(reader), **_windows(reader, family), **_ropes(reader, family), **_scales(reader, family)}
    for name, flag in family.bias_fields.items():
        fields[name] = flag if isinstance(flag, bool) else reader.get(flag, bool, False)
    stored = values.get("dtype", values.get("torch_dtype"))
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    try:
        return DecoderConfig(**fields, **family.fixed, model_type=model_type, dtype=dtype, param_dtype=dtype)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _sizes(reader: JsonReader) -> dict[str, Any]:
    heads = reader.get("num_attention_heads", int, required=True)
    return {
        "vocab_size": reader.get("vocab_size", int, required=True),
        "hidden_size": reader.get("hidden_size", int, required=True),
        "intermediate_size": reader.get("intermediate_size", int, required=True),
        "num_layers": reader.get("num_hidden_layers", int, required=True),
        "num_heads": heads,
        "num_kv_heads": reader.get("num_key_value_heads", int) or heads,
        "head_dim": reader.get("head_dim", int) or 0,
        "max_position_embeddings": reader.get("max_position_embeddings", int, required=True),
        "rms_norm_eps": reader.get("rms_norm_eps", float, 1e-6),
        "tie_word_embeddings": reader.get("tie_word_embeddings", bool, False),
        "initializer_range": reader.get("initializer_range", float, 0.02),
    }


def _scales(reader: JsonReader, family: Family) -> dict[str, Any]:
    fields: dict[str, Any] = {name: reader.get(theirs, float) for name, theirs in family.positive.items()}
    fields["hidden_act"] = reader.get(family.activation, str, "silu")
    if family.scaled_embedding:
        fields["embedding_scale"] = reader.get("hidden_size", int, required=True) ** 0.5
    return fields


def _windows(reader: JsonReader, family: Family) -> dict[str, Any]:
    window = reader.get("sliding_window", int, required=family.window == "pattern")
    if family.window == "none" or window is None:
        return {}
    if family.window == "all":
        return {"sliding_window": window}
    if family.window == "upper" and not reader.get("use_sliding_window", bool, False):
        return {}
    layers = reader.get("num_hidden_layers", int, required=True)
    kinds = reader.get("layer_types", list)
    if kinds is None and family.window == "pattern":
        pattern = reader.get("sliding_window_pattern", int, required=True)
        return {"sliding_window": window, "sliding_layers": tuple((n + 1) % pattern != 0 for n in range(layers))}
    if kinds is None:
        first = reader.get("max_window_layers", int, 0)
        return {"sliding_window": window, "sliding_layers": tuple(layer >= first for layer in range(layers))}
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise reader.fail("layer_types", f"must name full_attention or sliding_attention {layers} times, got {kinds}")
    return {"sliding_window": window, "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds)}


_LAYER_KINDS = ("full_attention", "sliding_attention")


def _ropes(reader: JsonReader, family: Family) -> dict[str, Any]:
    """Rope settings; those that differ by kind of layer are nested under the kinds' names, or have a theta apart."""
    name = "rope_parameters" if reader.values.get("rope_parameters") else "rope_scaling"
    settings = reader.get(name, dict) or {}
    if not family.sliding_rope:
        return _rope(reader, name, settings, "rope_theta")
    nested = set(settings) & set(_LAYER_KINDS)
    parts = [settings.get(kind) or {} for kind in _LAYER_KINDS] if nested else [settings, {}]
    if not all(isinstance(part, dict) for part in parts):
        raise reader.fail(name, f"must hold an object for each of {', '.join(_LAYER_KINDS)}")
    sliding = _rope(reader, name, parts[1], family.sliding_rope)
    return {**_rope(reader, name, parts[0], "rope_theta"), **{f"sliding_{key}": of for key, of in sliding.items()}}


def _rope(reader: JsonReader, name: str, settings: dict[str, Any], theta_name: str) -> dict[str, Any]:
    inner = JsonReader(reader.path, settings, {})
    theta = inner.get("rope_theta", float) or reader.get(theta_name, float) or 10000.0
    for source in (inner, reader):
        if source.get("partial_rotary_factor", float, 1.0) != 1.0:
            raise reader.fail("partial_rotary_factor", "is not 1; rotating a part of each head is not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    unknown = set(settings) - set(_ROPE_FIELDS) - _ROPE_IGNORED
    if unknown:
        raise reader.fail(name, f"has unknown entries {sorted(unknown)} for rope type {kind!r}")
    options = {key: inner.get(key, of) for key, of in _ROPE_FIELDS.items() if settings.get(key) is not None}
    if kind != "linear":
        outer = reader.get("original_max_position_embeddings", int)
        fallback = reader.get("max_position_embeddings", int)
        options["original_max_position_embeddings"] = (
            outer or options.get("original_max_position_embeddings") or fallback
        )
    try:
        scaling = RopeScaling(kind=kind, factor=inner.get("factor", float, required=True), **options)
    except ModelFileError:
        raise
    except ValueError as error:
        raise reader.fail(name, f"is refused: {error}") from None
    return {"rope_theta": theta, "rope_scaling": scaling}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling that both old and new readers understand.

    Raises:
      ValueError: the config has a feature that its family's files cannot express.
    """
    if isinstance(config, EncoderConfig):
        return encoder_to_hf(config)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[config.model_type]
    values = {"architectures": [family.architecture], "model_type": config.model_type, **_sizes_to_hf(config)}
    values |= {**_ropes_to_hf(config, family), **_scales_to_hf(config, family), **_windows_to_hf(config, family)}
    values |= {flag: getattr(config, ours) for ours, flag in family.bias_fields.items() if isinstance(flag, str)}
    values["torch_dtype"] = str(config.param_dtype)
    if not same_model(_parse(Path("config.json"), values), config):
        raise ValueError(
            f"a {config.model_type} config.json cannot express this config; choose the model_type whose files can"
        )
    return values


def _sizes_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }


def _scales_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {family.activation: config.hidden_act}
    for ours, theirs in family.positive.items():
        value = getattr(config, ours)
        values[theirs] = int(value) if ours == "query_scalar" and value == int(value) else value
    return values


def _windows_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    if family.window == "none":
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.window == "upper":
        values["use_sliding_window"] = config.sliding_window is not None
    if family.window in ("upper", "pattern"):
        values["layer_types"] = [_LAYER_KINDS[window is not None] for window in config.windows]
    return values


def _ropes_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    if family.sliding_rope:
        values[family.sliding_rope] = config.sliding_rope_theta
    if config.sliding_rope_scaling is None:
        return values | {"rope_scaling": _rope_to_hf(config.rope_scaling)}
    by_kind = {
        kind: {"rope_theta": theta, **(_rope_to_hf(scaling) or {"rope_type": "default"})}
        for kind, (theta, scaling) in zip(_LAYER_KINDS, config.ropes, strict=True)
    }
    return values | {"rope_parameters": by_kind}


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    needed = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": tuple(name for name in _ROPE_FIELDS if not name.endswith("freq_factor")),
    }[scaling.kind]
    options = {
        name: value
        for name in _ROPE_FIELDS
        if (value := getattr(scaling, name)) is not None and (name in needed or value != getattr(RopeScaling, name))
    }
    return {"rope_type": scaling.kind, "factor": scaling.factor, **options}
