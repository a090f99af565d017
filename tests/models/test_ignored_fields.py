"""What transformers passes over has no effect here either, and one sentence says so; what it reads is not mentioned."""

import json
import re

import pytest
from spellings import BASES, SIZES
from transformers_reading import write

from mor_jax.models import ModelFileError, known_config, read_config
from mor_jax.models.presets import PRESETS

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_NESTED = {"full_attention": _LINEAR, "sliding_attention": {"rope_type": "default"}}
_KINDS = ["sliding_attention", "full_attention"]
# family, the fields that count, those that do not, and what is said of these
IGNORED = [
    ("llama", {}, {"finetuned": True}, "field 'finetuned' is ignored: no part of a llama in transformers"),
    (
        "llama",
        {},
        {"attention_multiplier": 2.0, "logits_scaling": 8.0},
        "fields 'attention_multiplier', 'logits_scaling' are ignored: no part of a llama",
    ),
    ("llama", {}, {"pretraining_tp": 2}, "field 'pretraining_tp' is ignored"),
    ("llama", {}, {"final_logit_softcapping": 3.0}, "field 'final_logit_softcapping' is ignored"),
    ("llama", {}, {"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' is ignored: in this family rope"),
    ("llama", {}, {"auto_map": {"AutoConfig": "other.Config"}}, "field 'auto_map' is ignored"),
    ("llama", {"dtype": "bfloat16"}, {"torch_dtype": "float32"}, "field 'torch_dtype' is ignored: dtype is there too"),
    (
        "llama",
        {"rope_scaling": _LINEAR},
        {"rope_parameters": {"rope_theta": 5.0}},
        "field 'rope_parameters' is ignored",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 5.0}},
        {"rope_theta": 7.0},
        "field 'rope_theta' is ignored: that of rope",
    ),
    ("llama", {}, {"rope_parameters": _NESTED}, "fields 'full_attention', 'sliding_attention' of rope_parameters are"),
    ("mistral", {}, {"attention_bias": True}, "field 'attention_bias' is ignored: no part of a mistral"),
    ("mistral", {}, {"max_window_layers": 1}, "field 'max_window_layers' is ignored"),
    ("qwen2", {}, {"attention_bias": False}, "field 'attention_bias' is ignored"),
    ("qwen3", {}, {"mlp_bias": True}, "field 'mlp_bias' is ignored"),
    ("gemma2", {}, {"sliding_window_pattern": 3}, "field 'sliding_window_pattern' is ignored: 2 holds"),
    ("gemma2", {}, {"hidden_act": "relu"}, "field 'hidden_act' is ignored"),
    (
        "gemma3_text",
        {},
        {"attn_logit_softcapping": 5.0},
        "field 'attn_logit_softcapping' is ignored: transformers does",
    ),
    (
        "gemma3_text",
        {"layer_types": _KINDS},
        {"sliding_window_pattern": 1},
        "'sliding_window_pattern' is ignored: layer",
    ),
    (
        "gemma3_text",
        {"layer_types": None},
        {"_sliding_window_pattern": 2},
        "'_sliding_window_pattern' is ignored: 6 holds",
    ),
    ("gemma3_text", {}, {"rope_parameters": _LINEAR}, "fields 'rope_type', 'factor' of rope_parameters are ignored"),
    ("gemma3_text", {}, {"original_max_position_embeddings": 8}, "field 'original_max_position_embeddings' is ignored"),
    (
        "gemma3_text",
        {},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "fields 'type', 'factor' of rope_scaling are",
    ),
]


@pytest.mark.parametrize(("family", "read", "ignored", "message"), IGNORED)
def test_ignored_fields_are_named_in_one_sentence(family, read, ignored, message, tmp_path, caplog):
    plain = read_config(write(tmp_path, {"model_type": family, **BASES[family], **read}))
    assert not caplog.records
    assert read_config(write(tmp_path, {"model_type": family, **BASES[family], **read, **ignored})) == plain
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{tmp_path / 'config.json'}: ")
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("scaling", "more", "message"),
    [
        (_YARN, {"attn_factor": 3.0}, "field 'attn_factor' of {} is ignored: rope type 'yarn' does not read it"),
        (
            _YARN,
            {"finetuned": True, "x": 1},
            "fields 'finetuned', 'x' of {} are ignored: rope type 'yarn' does not read",
        ),
        (_LINEAR, {"original_max_position_embeddings": 8}, "field 'original_max_position_embeddings' of {} is ignored"),
        (
            {"rope_type": "default"},
            {"factor": 2.0},
            "field 'factor' of {} is ignored: rope type 'default' does not read",
        ),
        (_LINEAR, {"type": "yarn"}, "field 'type' of {} is ignored"),
        ({"rope_type": "default"}, {"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' of {} is ignored"),
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_ignored_entries_of_a_rope(scaling, more, message, place, tmp_path, caplog):
    plain = read_config(write(tmp_path, {"model_type": "llama", **SIZES, place: scaling}))
    assert not caplog.records
    assert read_config(write(tmp_path, {"model_type": "llama", **SIZES, place: {**scaling, **more}})) == plain
    (record,) = caplog.records
    assert message.format(place) in record.getMessage()


@pytest.mark.parametrize("change", [{"position_embedding_type": "relative_key"}, {"rope_theta": 5.0}])
def test_ignored_fields_of_an_encoder(change, tmp_path, caplog):
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    plain = read_config(write(tmp_path, {"model_type": "bert", **sizes}))
    assert not caplog.records
    assert read_config(write(tmp_path, {"model_type": "bert", **sizes, **change})) == plain
    (record,) = caplog.records
    assert f"field '{next(iter(change))}' is ignored: no part of a bert" in record.getMessage()


@pytest.mark.oracle
@pytest.mark.parametrize("family", [*BASES, "bert", "roberta"])
def test_nothing_is_said_of_what_transformers_writes(family, tmp_path, caplog):
    """Of each field of its configuration, set to the default, and of the settings of generation that it drops."""
    pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    unknown = ("layer_types", *([] if family in BASES else ["num_key_value_heads"]))
    sizes = {name: value for name, value in BASES.get(family, SIZES).items() if name not in unknown}
    settings = CONFIG_MAPPING[family](**sizes)
    settings.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    dropped = {name: value or 1 for name, value in GenerationConfig._get_default_generation_params().items()}
    read_config(write(tmp_path, {**settings.to_dict(), **written, **dropped, "use_cache": True}))
    assert not [record.getMessage() for record in caplog.records]


def test_nothing_is_said_of_known_models(caplog):
    for name in PRESETS:
        known_config(name)
    assert not caplog.records


def test_numbers_that_json_cannot_write_are_refused(tmp_path):
    for name, value in (("rms_norm_eps", float("nan")), ("rope_theta", float("inf"))):
        write(tmp_path, {"model_type": "llama", **SIZES, name: value})
        with pytest.raises(ModelFileError, match=re.escape(f"field {name!r} must be a finite number")):
            read_config(tmp_path)
