"""Which models a `config.json` may describe, and what to say of one that is not supported."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from mor_jax.models.hf_encoder import ENCODER_FAMILIES
from mor_jax.models.hf_families import FAMILIES
from mor_jax.models.hf_json import JsonReader, ModelFileError

_KNOWN = sorted([*FAMILIES, *ENCODER_FAMILIES])
_OTHER_NAMES = {  # names of models, which people write for their family's
    "gemma3": "gemma3_text",
    "minilm": "bert",
    "qwen": "qwen2",
    "smollm": "llama",
    "smollm2": "llama",
    "tinyllama": "llama",
}
_PARTS = ("vision_config", "audio_config", "image_config")


def check_kind(path: Path, values: dict[str, Any]) -> None:
    """Nothing for a file whose model is of a supported family, with weights in floating point.

    Raises:
      ModelFileError: it is not; the message says what it is instead, and what could be used.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _KNOWN:
        parts = [part for part in (*_PARTS, "text_config") if values.get(part) is not None]
        hint = _multimodal(values) if parts else _hint(values)
        raise ModelFileError(f"{path}: field 'model_type' is {model_type!r}; supported: {', '.join(_KNOWN)}{hint}")
    reader = JsonReader(path, values, {})
    if values.get("text_config") is not None:
        raise reader.fail("text_config", f"is set, and a {model_type} is a model of text alone")
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            method = values[name].get("quant_method") if isinstance(values[name], dict) else None
            which = f"quantised weights ({method})" if method else "quantised weights"
            raise reader.fail(name, f"is set; {which} are not supported, use a float checkpoint")
    layers = values.get("per_layer_config")
    if layers is not None and layers != {}:
        raise reader.fail("per_layer_config", f"is {layers!r}; layers that differ in their sizes are not supported")
    _check_padding(reader)


def _check_padding(reader: JsonReader) -> None:
    """torch's embedding wants the padding id among its rows, from either end."""
    padding, rows = reader.values.get("pad_token_id"), reader.values.get("vocab_size")
    if type(padding) is int and type(rows) is int and not -rows <= padding < rows:
        raise reader.fail("pad_token_id", f"is {padding}, which is not in the vocabulary of vocab_size = {rows}")


def _multimodal(values: dict[str, Any]) -> str:
    part = values.get("text_config")
    nested = part.get("model_type") if isinstance(part, dict) else None
    nested = nested or ("gemma3_text" if values.get("model_type") == "gemma3" else None)
    if nested is None:
        return "; this is a multimodal model, and supported are models of text alone"
    said = f"; this is a multimodal model, whose text_config describes a {nested}"
    if nested not in _KNOWN:
        return f"{said}: that is not supported either"
    return f"{said}: that is supported, so save this part of it (its `language_model`) as a checkpoint of its own"


def _hint(values: dict[str, Any]) -> str:
    """The supported family that is meant, if there is one that comes near."""
    model_type = values.get("model_type")
    if model_type == "gemma3":
        return "; did you mean gemma3_text, the model of text alone within a multimodal gemma3?"
    if model_type is None:
        names = values.get("architectures")
        first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        families = {family.architecture.removesuffix("ForCausalLM"): name for name, family in FAMILIES.items()}
        families |= {family.prefix: name for name, family in ENCODER_FAMILIES.items()}
        found = next(
            (name for prefix, name in families.items() if first.startswith((f"{prefix}For", f"{prefix}M"))), ""
        )
        return f"; architectures names {first}: did you mean {found}?" if found else ""
    if not isinstance(model_type, str):
        return ""
    written = model_type.lower().replace("-", "").replace("_", "").replace(".", "").replace(" ", "")
    if written not in _OTHER_NAMES and model_type in _families_of_transformers():
        return "; that is another family, whose weights mean something else"
    plain = {name.replace("_", ""): name for name in _KNOWN} | _OTHER_NAMES
    near = difflib.get_close_matches(written, plain, n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""


def _families_of_transformers() -> set[str]:
    from transformers import CONFIG_MAPPING  # slow to import: for an error alone

    return set(CONFIG_MAPPING.keys())
