"""`config.json` of BERT-like encoders to `EncoderConfig` and back.

The class that a file names decides the modules: a bare model, a classifier, or a pre-training model whose own heads are
left out when its weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_jax.models.config import EncoderConfig
from mor_jax.models.hf_fields import check_silent, read_activation, read_dtype, warn_of_unknown
from mor_jax.models.hf_json import JsonReader, ModelFileError


@dataclass(frozen=True)
class EncoderFamily:
    """How one `model_type` differs from BERT."""

    prefix: str  # of its class names
    head: str  # of its classifier, see `EncoderConfig.head`
    padded_positions: bool  # positions begin after the padding id
    pretraining_pooler: bool  # published pre-training checkpoints carry the pooler
    defaults: dict[str, Any]  # values where `config.json` is silent


_BERT = {"max_position_embeddings": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0}
ENCODER_FAMILIES = {
    "bert": EncoderFamily("Bert", "linear", False, True, _BERT),
    "roberta": EncoderFamily("Roberta", "dense", True, False, {**_BERT, "pad_token_id": 1}),
}
LABEL_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")
_ONE_CLASS = "single_label_classification"
_READ = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "type_vocab_size"),
    *("max_position_embeddings", "layer_norm_eps", "hidden_act", "initializer_range"),
    *("is_decoder", "add_cross_attention", "tie_word_embeddings"),
)
_RATES = {  # that may be null, or not
    "hidden_dropout_prob": False,
    "attention_probs_dropout_prob": False,
    "classifier_dropout": True,
    "chunk_size_feed_forward": False,
}
_CLASSIFIER = "ForSequenceClassification"
_PRETRAINING = ("ForMaskedLM", "ForPreTraining")


def parse_encoder(path: Path, values: dict[str, Any]) -> EncoderConfig:
    """The `EncoderConfig` of a `config.json` whose model type is one of `ENCODER_FAMILIES`.

    Raises:
      ModelFileError: a field is missing or malformed, or the model is of an unsupported kind.
    """
    family = ENCODER_FAMILIES[values["model_type"]]
    reader = JsonReader(path, values, family.defaults)
    decoders = [name for name in ("is_decoder", "add_cross_attention") if reader.get(name, bool, False)]
    if decoders:
        raise reader.fail(decoders[0], "is true; only bidirectional encoders are supported")
    kind = _kind(reader, family)
    head = family.head if kind == _CLASSIFIER else "none"
    fields = {
        "vocab_size": reader.count("vocab_size"),
        "hidden_size": reader.count("hidden_size"),
        "intermediate_size": reader.count("intermediate_size"),
        "num_layers": reader.count("num_hidden_layers"),
        "num_heads": reader.count("num_attention_heads"),
        "max_position_embeddings": reader.count("max_position_embeddings"),
        "position_offset": reader.get("pad_token_id", int, required=True) + 1 if family.padded_positions else 0,
        "type_vocab_size": reader.count("type_vocab_size"),
        "layer_norm_eps": reader.get("layer_norm_eps", float, required=True),
        "hidden_act": read_activation(reader, "hidden_act", "gelu"),
        "initializer_range": reader.get("initializer_range", float, 0.02),
        "pooler": _has_pooler(kind, head, family),
        "head": head,
        "labels": _labels(reader) if head != "none" else (),
    }
    dtype = read_dtype(reader)
    check_silent(reader, _RATES)
    reader.get("tie_word_embeddings", bool, True)
    usual = values.get("position_embedding_type") == "absolute"  # older files say so; there is no other kind any more
    known = {*_READ, "position_embedding_type"} if usual else {*_READ}
    warn_of_unknown(reader, known, values["model_type"])
    try:
        return EncoderConfig(**fields, model_type=values["model_type"], dtype=dtype, param_dtype=dtype)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _kind(reader: JsonReader, family: EncoderFamily) -> str:
    """What follows the family in the name of the class that the file names."""
    names = reader.get("architectures", list, nullable=True) or [f"{family.prefix}Model"]
    kinds = ("Model", _CLASSIFIER, *_PRETRAINING)
    if names[0] not in [family.prefix + kind for kind in kinds]:
        known = ", ".join(family.prefix + kind for kind in kinds)
        raise reader.fail("architectures", f"names {names[0]!r}; supported: {known}")
    return names[0].removeprefix(family.prefix)


def _has_pooler(kind: str, head: str, family: EncoderFamily) -> bool:
    if kind == "Model":
        return True
    return head == "linear" if kind == _CLASSIFIER else family.pretraining_pooler


def _labels(reader: JsonReader) -> tuple[str, ...]:
    kind = reader.get("problem_type", str, nullable=True) or _ONE_CLASS
    if kind != _ONE_CLASS:
        raise reader.fail("problem_type", f"is {kind!r}; only {_ONE_CLASS} is supported")
    names, number = reader.get("id2label", dict, nullable=True), reader.count("num_labels", required=False)
    if names is None or number not in (None, len(names)):
        if names is not None:
            reader.ignore(["id2label"], f"it names {len(names)} classes, but num_labels = {number} goes before it")
        if number == 1:
            raise reader.fail("num_labels", "is 1, which is a regression; at least two classes are supported")
        return tuple(f"LABEL_{each}" for each in range(number or 2))
    try:
        ordered = {int(each): str(name) for each, name in names.items()}
    except ValueError:
        raise reader.fail("id2label", "must have whole numbers as keys") from None
    if sorted(ordered) != list(range(len(ordered))) or len(ordered) < 2:
        raise reader.fail("id2label", f"must name at least two classes 0, 1, ...; got {sorted(ordered)}")
    return tuple(ordered[each] for each in range(len(ordered)))


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` of an `EncoderConfig`.

    Raises:
      ValueError: no class of its family has these modules.
    """
    if config.model_type not in ENCODER_FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(sorted(ENCODER_FAMILIES))}")
    family = ENCODER_FAMILIES[config.model_type]
    values = {
        "architectures": [family.prefix + (_CLASSIFIER if config.head != "none" else "Model")],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": float(config.layer_norm_eps),
        "hidden_act": config.hidden_act,
        "initializer_range": float(config.initializer_range),
        "pad_token_id": config.position_offset - 1 if family.padded_positions else family.defaults["pad_token_id"],
        "position_embedding_type": "absolute",
        "torch_dtype": str(config.param_dtype),
        **label_fields(config),
    }
    how = ("dtype", "param_dtype", "scan_layers", "remat")
    parsed = parse_encoder(Path("config.json"), values)
    differing = [
        name
        for name in config.__dataclass_fields__
        if name not in how and getattr(parsed, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(f"a {config.model_type} config.json cannot express {', '.join(differing)} of this config")
    return values


def label_fields(config: EncoderConfig) -> dict[str, Any]:
    """The fields that name the classes of a head; empty without one."""
    if config.head == "none":
        return {}
    names = {str(number): name for number, name in enumerate(config.labels)}
    return {
        "id2label": names,
        "label2id": {name: int(number) for number, name in names.items()},
        "num_labels": len(config.labels),
        "problem_type": _ONE_CLASS,
    }
