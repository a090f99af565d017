"""Which layers of a `config.json` have a window, and back."""

from __future__ import annotations

from typing import Any

from mor_jax.models.config import DecoderConfig
from mor_jax.models.hf_families import Family
from mor_jax.models.hf_json import JsonReader
from mor_jax.models.hf_rope import LAYER_KINDS

_FULL, _SLIDING = LAYER_KINDS
_OLD_KINDS = {"attention": _FULL}
_GEMMA2_PATTERN, _GEMMA3_PATTERN = 2, 6  # every second or sixth layer is without a window


def read_kinds(reader: JsonReader, family: Family) -> list[str] | None:
    """The kind of each layer, "full_attention" or "sliding_attention"; None where the file tells none apart.

    Raises:
      ModelFileError: the layers are listed wrongly, or a number that decides them is.
    """
    layers = reader.count("num_hidden_layers") or 0
    listed = _listed(reader, layers)
    if family.window == "all" and "layer_types" in reader.values:
        return listed or [_SLIDING] * layers
    if family.window == "upper":
        first = reader.get("max_window_layers", int, required=True)
        window = _upper_window(reader)
        return listed or [_SLIDING if window and layer >= first else _FULL for layer in range(layers)]
    if family.window == "pattern":
        return _pattern_kinds(reader, family, layers, listed)
    return listed


def _listed(reader: JsonReader, layers: int) -> list[str] | None:
    kinds = reader.get("layer_types", list, nullable=True)
    if kinds is None:
        return None
    names = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if len(names) != layers or any(name not in LAYER_KINDS for name in names):
        raise reader.fail("layer_types", f"must name full_attention or sliding_attention {layers} times, got {kinds}")
    return names


def _pattern_kinds(reader: JsonReader, family: Family, layers: int, listed: list[str] | None) -> list[str]:
    """Gemma 2 knows no other pattern than its own, and neither reads the one with an underscore, which they write."""
    read, default = ("sliding_window_pattern", _GEMMA3_PATTERN) if family.sliding_rope else ("", _GEMMA2_PATTERN)

    def kinds(pattern: int) -> list[str]:
        return [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]

    pattern = default
    if read and listed is None:
        pattern = reader.get(read, int, default)
        if pattern == 0:
            raise reader.fail(read, "must not be 0")
    found = listed or kinds(pattern)
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        value = reader.values.get(name)
        if value is None or (name == read and listed is None):
            continue
        if type(value) is not int or value == 0 or kinds(value) != found:
            reader.ignore([name], "layer_types says which layers have a window" if listed else f"{default} holds")
    return found


def _upper_window(reader: JsonReader) -> int | None:
    window = reader.get("sliding_window", int, nullable=True)
    return window if reader.get("use_sliding_window", bool, False) else None


def read_windows(reader: JsonReader, family: Family, kinds: list[str] | None) -> dict[str, Any]:
    """The window fields of a `DecoderConfig`, whose layers are of these `kinds`.

    Raises:
      ModelFileError: a field is malformed, or says what transformers does in some passes and not in others.
    """
    slides = tuple(kind == _SLIDING for kind in kinds or ())
    if family.window == "none":
        _check_windowless(reader, kinds)
        return {}
    if family.window == "upper":
        window = _upper_window(reader)
        if window is None and any(slides):
            raise reader.fail(
                "layer_types", f"names {_SLIDING}, but sliding_window is null or use_sliding_window is not true"
            )
    else:
        window = reader.get("sliding_window", int, required=family.window == "pattern", nullable=family.window == "all")
    if window is not None and window < 1 and (not kinds or any(slides)):
        raise reader.fail("sliding_window", f"must be at least 1, got {window}")
    if family.window == "all" and kinds is None:
        if window is None:
            _refuse_cached(reader, "attention_chunk_size")
        return {"sliding_window": window}
    if family.window == "all" and (window is None or reader.values.get("head_dim") is None):
        name = "sliding_window" if window is None else "head_dim"
        raise reader.fail(name, "is missing; transformers reads a mistral with layer_types as a ministral, with both")
    return {} if window is None else {"sliding_window": window, "sliding_layers": slides}


def _check_windowless(reader: JsonReader, kinds: list[str] | None) -> None:
    """A Llama of transformers has no window, but its key-value cache keeps to one that the file names."""
    if kinds is None:
        _refuse_cached(reader, "sliding_window")
        _refuse_cached(reader, "attention_chunk_size")
    elif _SLIDING in kinds:
        raise reader.fail("layer_types", f"names {_SLIDING}, which this model does not have in a whole pass")


def _refuse_cached(reader: JsonReader, name: str) -> None:
    value = reader.values.get(name)
    if value is not None:
        raise reader.fail(
            name,
            f"is {value!r}, which transformers keeps to when this model generates but not in a whole pass; "
            "supported is null",
        )


def windows_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The window fields of the `config.json` of a model."""
    if family.window == "none":
        return {}
    values: dict[str, Any] = {"sliding_window": config.sliding_window}
    mixed = len(set(config.windows)) > 1
    if family.window == "all" and not mixed:
        return {"sliding_window": config.windows[0]}
    if family.window == "upper":
        values["use_sliding_window"] = config.sliding_window is not None
    return values | {"layer_types": [LAYER_KINDS[window is not None] for window in config.windows]}
