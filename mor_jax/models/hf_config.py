"""`config.json` of Hugging Face to `DecoderConfig` and back.

A family is one row of `FAMILIES`: the values that its files may leave out, and which projections carry a bias. The file
is read as plain JSON: no class named in it is imported, no code beside it is run.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mor_jax.models.config import DecoderConfig, RopeScaling
from mor_jax.models.presets import PRESETS, nearest_preset, preset


class ModelFileError(ValueError):
    """A file of a model directory is missing, malformed, or does not fit; the message names file and part."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from Llama."""

    architecture: str  # the class name that Hugging Face files carry
    defaults: dict[str, Any] = field(default_factory=dict)  # values where `config.json` is silent
    bias_fields: dict[str, Any] = field(default_factory=dict)  # ours -> name of the JSON flag, or a fixed bool
    qk_norm: bool = False
    window: str = "none"  # "all" layers, "upper" (from max_window_layers on, when use_sliding_window), "none"


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
        qk_norm=True,
        window="upper",
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


@dataclass(frozen=True)
class _Reader:
    """Typed access to one JSON object; every complaint names the file and the field."""

    path: Path
    values: dict[str, Any]
    defaults: dict[str, Any]

    def fail(self, name: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: field {name!r} {problem}")

    def get(self, name: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        value = self.values.get(name, self.defaults.get(name, default))
        if value is None and not required:
            return None if name in self.values else default
        if value is None:
            raise self.fail(name, f"is missing; a {kind.__name__} is needed")
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(name, f"must be a {kind.__name__}, got {value!r}")
        return kind(value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ModelFileError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path}: a JSON object is needed, found a {type(values).__name__}")
    return values


def read_config(directory: str | os.PathLike) -> DecoderConfig:
    """The `DecoderConfig` that `directory/config.json` describes.

    Both spellings of rotary settings are read (`rope_theta` + `rope_scaling`, and `rope_parameters`). A file that says
    bfloat16 gives bfloat16 for `dtype` and `param_dtype`, any other float32; `dataclasses.replace` changes either.

    Raises:
      ModelFileError: the file is missing, a field is missing or malformed, or the model is of an unsupported kind
        (family, rope type, activation, quantised weights); the message names file and field.
    """
    path = Path(directory) / "config.json"
    return _parse(path, read_json(path))


def known_config(model: str | os.PathLike) -> DecoderConfig:
    """The `DecoderConfig` of a model directory, of a lone `config.json`, or of a well-known checkpoint by name.

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


def same_model(first: DecoderConfig, second: DecoderConfig) -> bool:
    """Whether the two describe one function of the same weights; dtypes, scan, remat and blocks do not count."""

    def plain(config: DecoderConfig) -> DecoderConfig:
        how = {"dtype": "float32", "param_dtype": "float32", "scan_layers": True, "remat": "none", "attention_block": 0}
        return replace(config, sliding_window=None, sliding_layers=(), **how)

    return first.windows == second.windows and plain(first) == plain(second)


def _parse(path: Path, values: dict[str, Any]) -> DecoderConfig:
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelFileError(
            f"{path}: field 'model_type' is {model_type!r}; supported: {', '.join(sorted(FAMILIES))}{hint}"
        )
    family = FAMILIES[model_type]
    reader = _Reader(path, values, family.defaults)
    if values.get("quantization_config"):
        raise reader.fail("quantization_config", "is set; quantised weights are not supported, use a float checkpoint")
    fields = {**_sizes(reader), **_windows(reader, family), **_rope(reader)}
    for name, flag in family.bias_fields.items():
        fields[name] = flag if isinstance(flag, bool) else reader.get(flag, bool, False)
    stored = values.get("dtype", values.get("torch_dtype"))
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    try:
        return DecoderConfig(**fields, qk_norm=family.qk_norm, model_type=model_type, dtype=dtype, param_dtype=dtype)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _sizes(reader: _Reader) -> dict[str, Any]:
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
        "hidden_act": reader.get("hidden_act", str, "silu"),
        "initializer_range": reader.get("initializer_range", float, 0.02),
    }


def _windows(reader: _Reader, family: Family) -> dict[str, Any]:
    window = reader.get("sliding_window", int)
    if family.window == "none" or window is None:
        return {}
    if family.window == "all":
        return {"sliding_window": window}
    if not reader.get("use_sliding_window", bool, False):
        return {}
    layers = reader.get("num_hidden_layers", int, required=True)
    kinds = reader.get("layer_types", list)
    if kinds is None:
        first = reader.get("max_window_layers", int, 0)
        return {"sliding_window": window, "sliding_layers": tuple(layer >= first for layer in range(layers))}
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise reader.fail("layer_types", f"must name full_attention or sliding_attention {layers} times, got {kinds}")
    return {"sliding_window": window, "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds)}


def _rope(reader: _Reader) -> dict[str, Any]:
    name = "rope_parameters" if reader.values.get("rope_parameters") else "rope_scaling"
    settings = reader.get(name, dict) or {}
    inner = _Reader(reader.path, settings, {})
    theta = inner.get("rope_theta", float) or reader.get("rope_theta", float) or 10000.0
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


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a `DecoderConfig`, in the spelling that both old and new readers understand.

    Raises:
      ValueError: the config has a feature that its family's files cannot express.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[config.model_type]
    values = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.param_dtype),
    }
    for ours, flag in family.bias_fields.items():
        if isinstance(flag, str):
            values[flag] = getattr(config, ours)
    if family.window != "none":
        values["sliding_window"] = config.sliding_window
    if family.window == "upper":
        values["use_sliding_window"] = config.sliding_window is not None
        values["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    if not same_model(_parse(Path("config.json"), values), config):
        raise ValueError(
            f"a {config.model_type} config.json cannot express this config; choose the model_type whose files can"
        )
    return values


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
