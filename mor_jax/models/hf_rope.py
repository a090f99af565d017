"""Rotary settings of a `config.json` and back.

Three spellings are in use: `rope_theta` beside `rope_scaling`, `rope_parameters` (which holds both), and
`rope_parameters` with such an object for each kind of layer. Which of several counts is what transformers makes of them
(`modeling_rope_utils.py` there, and `configuration_gemma3.py` for the third).
"""

from __future__ import annotations

from typing import Any

from mor_jax.models.config import ROPE_KINDS, DecoderConfig, RopeScaling
from mor_jax.models.hf_families import Family
from mor_jax.models.hf_json import JsonReader

LAYER_KINDS = ("full_attention", "sliding_attention")
_LENGTH = "original_max_position_embeddings"
_SPANS = ("beta_fast", "beta_slow")
_FACTORS = ("attention_factor", "mscale", "mscale_all_dim")
_ENTRIES = {  # beside rope_type and rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": ("factor", _LENGTH, *_SPANS, *_FACTORS, "truncate"),
}


def read_ropes(reader: JsonReader, family: Family, kinds: list[str] | None) -> dict[str, Any]:
    """The rope fields of a `DecoderConfig`.

    Args:
      reader: of the `config.json`.
      family: the row of its model type.
      kinds: of the layers, where the file or the family tells them apart.

    Raises:
      ModelFileError: a setting is missing, malformed or of an unsupported kind.
    """
    if family.sliding_rope:
        return _ropes_by_kind(reader, family)
    scaling, parameters = reader.values.get("rope_scaling"), reader.get("rope_parameters", dict, nullable=True)
    name = "rope_scaling" if scaling else "rope_parameters"
    settings = reader.get(name, dict, nullable=True) or {}
    if scaling and parameters and parameters != scaling:
        reader.ignore(["rope_parameters"], "rope_scaling is there too, and goes before it")
    nested = [key for key in settings if key in (kinds or ())]
    if nested:
        raise reader.fail(
            name,
            f"has settings by kind of layer ({', '.join(nested)}); this model has one rope for all: give that alone",
        )
    return _rope(reader, name, settings, "rope_theta", reader.values.get(_LENGTH, settings.get(_LENGTH, _ABSENT)))


_ABSENT = object()


def _ropes_by_kind(reader: JsonReader, family: Family) -> dict[str, Any]:
    """Of a family whose layers with a window have a rope of their own; `rope_scaling` is for the others alone."""
    given = reader.get("rope_parameters", dict, nullable=True)
    scaling = reader.get("rope_scaling", dict, nullable=True)
    default = {"rope_type": "default"}
    parts = {kind: default if given is None else given.get(kind) for kind in LAYER_KINDS}
    if scaling is not None and parts["full_attention"] is None:
        raise reader.fail("rope_scaling", "changes 'full_attention' of rope_parameters, which has no such entry")
    if not all(part is None or isinstance(part, dict) for part in parts.values()):
        raise reader.fail("rope_parameters", f"must hold an object for each of {', '.join(LAYER_KINDS)}")
    full = {**(parts["full_attention"] or default), **(scaling or {})}
    sliding = parts["sliding_attention"] or default
    yarn = any(_kind(part) == "yarn" for part in (full, sliding))
    read = {*LAYER_KINDS, "truncate"} if yarn else {*LAYER_KINDS}
    outer = JsonReader(reader.path, given or {}, {}, "rope_parameters")
    others = [key for key, value in outer.values.items() if key not in read and value is not None]
    outer.ignore(others, f"the settings are those of {' and '.join(LAYER_KINDS)}")
    if reader.values.get(_LENGTH) is not None:
        reader.ignore([_LENGTH], "where each kind of layer has its rope, it is read among the settings of that")
    name = "rope_parameters" if scaling is None else "rope_scaling"
    found = {}
    for prefix, part, theta in (("", full, "rope_theta"), ("sliding_", sliding, family.sliding_rope)):
        if _kind(part) == "yarn":
            truncate = outer.values.get("truncate", True)
            if part.get("truncate", truncate) != truncate:
                outer.ignore(["truncate"], "of a kind of layer; it is read beside these")
            part = {**part, "truncate": truncate}
        rope = _rope(reader, name, part, theta, part.get(_LENGTH, _ABSENT))
        found |= {prefix + key: value for key, value in rope.items()}
    return found


def _kind(settings: dict[str, Any]) -> Any:
    return settings.get("rope_type", settings.get("type", "default"))


def _rope(reader: JsonReader, name: str, settings: dict[str, Any], theta_name: str, length: Any) -> dict[str, Any]:
    """One rope, of the settings in the field `name`; `length` is the original context length as the file gives it."""
    inner, kind = JsonReader(reader.path, settings, {}, name), _kind(settings)
    theta = _theta(reader, inner, theta_name)
    if not isinstance(kind, str) or kind not in _ENTRIES:
        supported = ", ".join(("default", *ROPE_KINDS))
        raise reader.fail(name, f"is refused: rope type {kind!r} is not supported; supported: {supported}")
    _check_partial(reader, inner, kind)
    read = {"rope_type", "rope_theta", "partial_rotary_factor", *_ENTRIES[kind]}
    read |= {"type"} if settings.get("type") == kind else set()
    others = [key for key, value in settings.items() if key not in read and value is not None]
    inner.ignore(others, f"rope type {kind!r} does not read {'it' if len(others) == 1 else 'them'}")
    if kind == "default":
        return {"rope_theta": theta}
    options = _options(reader, inner, kind, length)
    if kind == "yarn" and theta <= 1:
        raise reader.fail(name, f"is refused: rope type 'yarn' needs a rope_theta above 1, got {theta}")
    try:
        return {"rope_theta": theta, "rope_scaling": RopeScaling(kind=kind, **options)}
    except ValueError as error:
        raise reader.fail(name, f"is refused: {error}") from None


def _theta(reader: JsonReader, inner: JsonReader, theta_name: str) -> float:
    inside = "rope_theta" in inner.values
    source, key = (inner, "rope_theta") if inside else (reader, theta_name)
    theta = source.number(key, reader.defaults.get(theta_name, 10000.0))
    if theta is None or theta <= 0:
        raise source.fail(key, f"must be positive, got {theta}")
    if inside and reader.values.get(theta_name, theta) not in (theta, None):
        reader.ignore([theta_name], f"that of {inner.within} goes before it")
    return theta


def _check_partial(reader: JsonReader, inner: JsonReader, kind: str) -> None:
    """transformers' models of these families turn the whole head whatever this says, or fail where it is not 1."""
    name = "partial_rotary_factor"
    source = inner if name in inner.values else reader
    partial = source.values.get(name, 1.0)
    if partial == 1 or (partial is None and source is reader):
        return
    if kind != "default":
        raise source.fail(name, f"is not 1 but {partial!r}; rotating a part of each head is not supported")
    if partial is not None:
        source.ignore([name], "in this family rope type 'default' rotates the whole of each head")


def _options(reader: JsonReader, inner: JsonReader, kind: str, length: Any) -> dict[str, Any]:
    """The fields of a `RopeScaling` beside its kind."""
    if kind == "linear":
        return {"factor": inner.number("factor")}
    limit = reader.count("max_position_embeddings")
    original = limit if length is _ABSENT else length
    if type(original) is not int or original < 1:
        raise reader.fail(_LENGTH, f"must be a whole number of at least 1 for rope type {kind!r}, got {original!r}")
    if kind == "llama3":
        options = {entry: inner.number(entry) for entry in ("factor", "low_freq_factor", "high_freq_factor")}
        return options | {_LENGTH: original}
    options: dict[str, Any] = {entry: inner.number(entry, nullable=True) for entry in _FACTORS}
    spans = {entry: inner.number(entry, nullable=True) for entry in _SPANS}
    options |= {entry: value for entry, value in spans.items() if value}  # 0 and null are the default
    implied = "factor" in inner.values and inner.values["factor"] is None
    factor = (limit or 0) / original if implied else inner.number("factor")
    truncate = inner.get("truncate", bool, True, nullable=True)  # null is false
    return options | {"factor": factor, "truncate": bool(truncate), _LENGTH: original}


def ropes_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The rope fields of the `config.json` of a model."""
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    if family.sliding_rope:
        values[family.sliding_rope] = config.sliding_rope_theta
    if config.sliding_rope_scaling is None:
        return values | {"rope_scaling": _rope_to_hf(config.rope_scaling)}
    by_kind: dict[str, Any] = {
        kind: {"rope_theta": theta, **(_rope_to_hf(scaling) or {"rope_type": "default"})}
        for kind, (theta, scaling) in zip(LAYER_KINDS, config.ropes, strict=True)
    }
    return values | {"rope_parameters": by_kind}


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    options = {entry: getattr(scaling, entry) for entry in _ENTRIES[scaling.kind]}
    return {"rope_type": scaling.kind, **{entry: value for entry, value in options.items() if value is not None}}
