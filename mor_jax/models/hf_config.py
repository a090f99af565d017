"""`config.json` of Hugging Face to `DecoderConfig` or `EncoderConfig` and back.

A file means what it means to transformers 5, or it is refused: which of several spellings counts, what is absent and
what is null are settled there (`configuration_utils.py` and each family's own configuration). The file is read as plain
JSON: no class named in it is imported, no code beside it is run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mor_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from mor_jax.models.hf_encoder import ENCODER_FAMILIES, encoder_to_hf, parse_encoder
from mor_jax.models.hf_families import FAMILIES, Family
from mor_jax.models.hf_fields import check_silent, read_activation, read_dtype, warn_of_others
from mor_jax.models.hf_json import JsonReader, ModelFileError, read_json
from mor_jax.models.hf_kinds import check_kind
from mor_jax.models.hf_rope import read_ropes, ropes_to_hf
from mor_jax.models.hf_windows import read_kinds, read_windows, windows_to_hf
from mor_jax.models.presets import PRESETS, nearest_preset, preset


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
    check_kind(path, values)
    model_type = values["model_type"]
    if model_type in ENCODER_FAMILIES:
        return parse_encoder(path, values)
    family = FAMILIES[model_type]
    reader = JsonReader(path, values, family.defaults)
    _check_refused(reader, family)
    kinds = read_kinds(reader, family)
    fields = {**_sizes(reader, family), **read_windows(reader, family, kinds), **read_ropes(reader, family, kinds)}
    fields |= _scales(reader, family)
    for name, flag in family.bias_fields.items():
        fields[name] = flag if isinstance(flag, bool) else reader.get(flag, bool, False)
    dtype = read_dtype(reader)
    check_silent(reader, {"attention_dropout": "attention_dropout" in family.nullable}, family.initializer_limit)
    warn_of_others(reader, family)
    try:
        return DecoderConfig(**fields, **family.fixed, model_type=model_type, dtype=dtype, param_dtype=dtype)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _check_refused(reader: JsonReader, family: Family) -> None:
    """Fields that would make another function of the weights."""
    values = reader.values
    for name in family.refused:
        if values.get(name):
            raise reader.fail(name, f"is {values[name]!r}, which is not supported; supported is null or false")
    if not values.get("is_causal", True):
        raise reader.fail(
            "is_causal",
            f"is {values['is_causal']!r}: tokens would see later ones, which is not supported; supported is true",
        )
    if values.get("kv_sharing_modes") is not None:
        raise reader.fail("kv_sharing_modes", f"is {values['kv_sharing_modes']!r}; supported is null")


def _sizes(reader: JsonReader, family: Family) -> dict[str, Any]:
    hidden, heads = reader.count("hidden_size") or 0, reader.count("num_attention_heads") or 0
    if family.divided and hidden % heads:
        raise ModelFileError(
            f"{reader.path}: hidden_size {hidden} does not divide by {heads} heads, which transformers asks of this "
            "family even where head_dim is set"
        )
    nullable = {name: name in family.nullable for name in ("num_key_value_heads", "head_dim")}
    kv_heads = reader.count("num_key_value_heads", required=False, nullable=nullable["num_key_value_heads"])
    head_dim = reader.count("head_dim", required=False, nullable=nullable["head_dim"])
    return {
        "vocab_size": reader.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.count("intermediate_size"),
        "num_layers": reader.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "head_dim": head_dim or 0,
        "max_position_embeddings": reader.count("max_position_embeddings"),
        "rms_norm_eps": reader.get("rms_norm_eps", float, 1e-6),
        "tie_word_embeddings": reader.get("tie_word_embeddings", bool, False),
        "initializer_range": reader.get("initializer_range", float, 0.02),
    }


def _scales(reader: JsonReader, family: Family) -> dict[str, Any]:
    fields: dict[str, Any] = {name: reader.get(theirs, float, nullable=True) for name, theirs in family.caps.items()}
    for name, theirs in family.caps.items():
        if fields[name] is not None and fields[name] <= 0:
            raise reader.fail(theirs, f"must be positive or null, got {fields[name]}")
    if family.query_scalar:
        fields["query_scalar"] = float(reader.count("query_pre_attn_scalar") or 0)
    fields["hidden_act"] = read_activation(reader, family.activation, "silu")
    if family.scaled_embedding:
        fields["embedding_scale"] = (reader.count("hidden_size") or 0) ** 0.5
    return fields


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
    values |= {**ropes_to_hf(config, family), **_scales_to_hf(config, family), **windows_to_hf(config, family)}
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
        "rms_norm_eps": float(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": float(config.initializer_range),
    }


def _scales_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {family.activation: config.hidden_act}
    for ours, theirs in family.caps.items():
        cap = getattr(config, ours)
        values[theirs] = None if cap is None else float(cap)  # transformers takes no whole number for one
    if family.query_scalar:
        scalar = config.query_scalar
        values["query_pre_attn_scalar"] = int(scalar) if scalar is not None and scalar == int(scalar) else scalar
    return values
