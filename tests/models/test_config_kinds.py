"""Models that are not supported: the error says what they are, and which supported one comes near."""

import re

import pytest
from spellings import SIZES
from transformers_reading import write

from mor_jax.models import ModelFileError, read_config

_GEMMA3 = {
    "text_config": {"model_type": "gemma3_text", **SIZES},
    "vision_config": {"model_type": "siglip_vision_model"},
}


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (
            {"model_type": "gemma3", **_GEMMA3},
            "this is a multimodal model, whose text_config describes a gemma3_text: that is supported, so save this",
        ),
        ({"model_type": "gemma3", "vision_config": {}}, "whose text_config describes a gemma3_text: that is supported"),
        (
            {"model_type": "gemma3", **SIZES},
            "did you mean gemma3_text, the model of text alone within a multimodal gemma3?",
        ),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            "text_config describes a llama: that is supp",
        ),
        ({"model_type": "x", "text_config": {"model_type": "phi3"}}, "describes a phi3: that is not supported either"),
        (
            {"model_type": "qwen2_vl", "vision_config": {}},
            "this is a multimodal model, and supported are models of text",
        ),
        ({"model_type": "Llama"}, "did you mean llama?"),
        ({"model_type": "llama3"}, "did you mean llama?"),
        ({"model_type": "qwen-3"}, "did you mean qwen3?"),
        ({"model_type": "gemma-2"}, "did you mean gemma2?"),
        ({"model_type": "Gemma3Text"}, "did you mean gemma3_text?"),
        ({"model_type": "smollm2"}, "did you mean llama?"),
        ({"model_type": "MiniLM"}, "did you mean bert?"),
        ({"model_type": "mixtral"}, "that is another family, whose weights mean something else"),
        ({"model_type": "gemma"}, "that is another family, whose weights mean something else"),
        ({"model_type": "qwen3_moe"}, "that is another family"),
        ({"model_type": "distilbert"}, "that is another family"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures names Qwen3ForCausalLM: did you mean qwen3?"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "did you mean gemma3_text?"),
        ({"architectures": ["LlamaModel"]}, "did you mean llama?"),
        ({"architectures": ["RobertaForMaskedLM"]}, "did you mean roberta?"),
    ],
)
def test_what_a_model_is_instead(values, hint, tmp_path):
    with pytest.raises(ModelFileError) as caught:
        read_config(write(tmp_path, values))
    said = f"{tmp_path / 'config.json'}: field 'model_type' is {values.get('model_type')!r}; supported: bert, gemma2"
    assert str(caught.value).startswith(said)
    assert hint in str(caught.value)


@pytest.mark.parametrize("model_type", ["zebra", None, 5, ["llama"], {}])
def test_nothing_is_guessed_of_what_is_like_nothing(model_type, tmp_path):
    with pytest.raises(ModelFileError, match=re.escape(f"is {model_type!r}; supported: ") + ".*roberta$"):
        read_config(write(tmp_path, {"model_type": model_type, **SIZES}))


@pytest.mark.oracle
def test_every_family_of_transformers_is_another_or_ours(tmp_path):
    """No misspelling is guessed of a name that transformers knows."""
    pytest.importorskip("torch")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    ours = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "bert", "roberta"}
    assert ours <= set(CONFIG_MAPPING_NAMES)
    for model_type in sorted(set(CONFIG_MAPPING_NAMES) - ours - {"gemma3"}):
        with pytest.raises(ModelFileError, match="that is another family"):
            read_config(write(tmp_path, {"model_type": model_type}))


def test_a_nested_model_in_one_of_text_alone_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="field 'text_config' is set, and a llama is a model of text alone"):
        read_config(write(tmp_path, {"model_type": "llama", **SIZES, "text_config": {"model_type": "llama"}}))
