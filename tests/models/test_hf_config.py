"""config.json both ways: values that are left out mean what they mean in transformers, and errors name the field."""

import json
import re

import pytest
from tiny_models import FAMILIES, settings_of

from mor_jax.models import DecoderConfig, ModelFileError, RopeScaling, config_to_hf, read_config

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_write_is_what_transformers_and_we_read(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoConfig

    theirs = settings_of(name)
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert read_config(tmp_path) == config
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    fields = ("head_dim", "num_key_value_heads", "sliding_window", "layer_types", "rms_norm_eps", "rope_parameters",
              "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "max_position_embeddings")  # fmt: skip
    for field in fields:
        ours, wanted = getattr(again, field, None), getattr(theirs, field, None)
        if field == "rope_parameters":
            ours, wanted = ({k: v for k, v in each.items() if v is not None} for each in (ours, wanted))
            ours = {key: ours[key] for key in wanted}  # we may write defaults that were left out
        if field == "head_dim":
            wanted = wanted or theirs.hidden_size // theirs.num_attention_heads
        if field in ("sliding_window", "layer_types") and config.sliding_window is None:
            continue  # a window that is not used
        assert ours == wanted, field


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config")],
)
def test_fields_left_out_have_the_defaults_of_transformers(tmp_path, model_type, kind):
    pytest.importorskip("torch")
    import transformers

    sizes = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 8} if model_type != "llama" else SIZES
    theirs = getattr(transformers, kind)(**sizes)
    ours = read(tmp_path, model_type=model_type, **sizes)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16 // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hidden_act == theirs.hidden_act
    assert ours.sliding_window == (theirs.sliding_window if model_type == "mistral" else None)


@pytest.mark.oracle
@pytest.mark.parametrize(("model_type", "kind"), [("gemma2", "Gemma2Config"), ("gemma3_text", "Gemma3TextConfig")])
def test_fields_that_a_gemma_leaves_out_have_the_defaults_of_transformers(tmp_path, model_type, kind):
    pytest.importorskip("torch")
    import transformers

    sizes = {**SIZES, "num_hidden_layers": 7}
    theirs, ours = getattr(transformers, kind)(**sizes), read(tmp_path, model_type=model_type, **sizes)
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hidden_act == theirs.hidden_activation
    assert ours.sliding_window == theirs.sliding_window
    assert ours.query_scalar == theirs.query_pre_attn_scalar
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == theirs.final_logit_softcapping
    assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    theta = theirs.rope_parameters
    assert ours.rope_theta == theta.get("full_attention", theta)["rope_theta"]
    assert (ours.sliding_rope_theta or ours.rope_theta) == theta.get("sliding_attention", theta)["rope_theta"]


def test_old_and_new_spellings_of_rotary_settings(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    llama = {"model_type": "llama", **SIZES}
    old = read(tmp_path, **llama, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = read(tmp_path, **llama, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == RopeScaling(kind="llama3", **scaling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "field 'model_type' is 'gpt2'; supported: "),
        ({"model_type": "qwen"}, "did you mean qwen"),
        ({"model_type": None}, "field 'model_type' is None"),
        ({"vocab_size": None}, "field 'vocab_size' is missing; a int is needed"),
        ({"hidden_size": "16"}, "field 'hidden_size' must be a int, got '16'"),
        ({"num_hidden_layers": True}, "field 'num_hidden_layers' must be a int, got True"),
        ({"hidden_size": 18}, "hidden_size 18 does not divide by 4 heads"),
        ({"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_act": "swish2"}, "hidden_act must be one of"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config' is set; quantised"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "field 'factor' is missing"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            "field 'factor' must be a finite number, got '2' (in",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor must be positive"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "field 'partial_rotary_factor' is not 1",
        ),
    ],
)
def test_wrong_values_are_errors_with_file_and_field(tmp_path, change, message):
    with pytest.raises(ModelFileError, match=re.escape(message)) as caught:
        read(tmp_path, **{"model_type": "llama", **SIZES, **change})
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "a JSON object is needed"), (None, "no such")]
)
def test_no_config(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=f"config.json: {message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"remat": "some"}, "remat must be one of none, dots, full, offload"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"sliding_layers": (True,)}, "sliding_layers has 1 entries for 2 layers"),
    ],
)
def test_impossible_decoders(change, message):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**sizes, **change})
