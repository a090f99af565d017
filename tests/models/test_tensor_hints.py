"""Weights that are not what config.json describes: the error says what they are, of names that torch and PEFT give."""

import itertools
from functools import lru_cache

import numpy as np
import pytest
from safetensors.numpy import save_file
from spellings import BASES, SIZES
from transformers_reading import write

from mor_jax.models import ModelFileError, load_params, read_config
from mor_jax.models.tensor_hints import name_hint
from mor_jax.models.tensors import common_name, tensor_table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

_ENCODER = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
_VALUES = {
    **{family: {"model_type": family, **values} for family, values in BASES.items()},
    **{family: {"model_type": family, **_ENCODER} for family in ("bert", "roberta")},
}


def their_model(family, kind=None, **changes):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {name: value for name, value in _VALUES[family].items() if name != "model_type"}
    settings = CONFIG_MAPPING[family](**{**values, **changes})
    default = transformers.AutoModel if family in ("bert", "roberta") else transformers.AutoModelForCausalLM
    return getattr(transformers, kind)(settings) if kind else default.from_config(settings)


@lru_cache
def names_of(family):
    model = their_model(family)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings and "gemma" in family else []
    return frozenset(model.state_dict()) - frozenset(tied)


def save(folder, state, family, **changes):
    """A model folder of the family whose weights are these, by whatever names."""
    write(folder, {**_VALUES[family], **changes})
    save_file({name: np.ascontiguousarray(value.detach().numpy()) for name, value in state.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def assert_refused(folder, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        load_params(folder, read_config(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", BASES)
def test_a_model_without_its_head_is_named(family, tmp_path):
    whole = their_model(family)
    bare = type(whole.model).__name__.replace("TextModel", "Model")
    message = (
        f"names lack the prefix 'model.': the file was saved from a {bare}, without its head; save it from {bare[:-5]}"
    )
    assert_refused(save(tmp_path, whole.model.state_dict(), family), message)


def wrapped(family):
    """State of a model in whatever puts itself before its names, and what is said of it."""
    model = their_model(family)
    yield torch.compile(model).state_dict(), r"'_orig_mod\.', which torch.compile puts there: save the model that was"
    yield torch.nn.DataParallel(model).state_dict(), r"'module\.', which DataParallel or Distributed"
    yield torch.compile(torch.nn.DataParallel(model)).state_dict(), r"'_orig_mod\.', which torch.compile puts there"
    yield torch.compile(model.base_model).state_dict(), r"'_orig_mod\.', which torch.compile puts there"
    fsdp = {
        name.replace("layers.", "layers._fsdp_wrapped_module."): value for name, value in model.state_dict().items()
    }
    if family == "llama":
        yield fsdp, r"'_fsdp_wrapped_module\.', which FullyShardedDataParallel"
    yield {f"base_model.model.{name}": value for name, value in model.state_dict().items()}, "which PEFT puts there"
    yield {f"pretrained_model.{name}": value for name, value in model.state_dict().items()}, "which TRL's value head"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "roberta"])
def test_wrapped_models_are_named(family, tmp_path):
    for state, message in wrapped(family):
        folder = tmp_path / message[:8].strip("'\\.")
        folder.mkdir(exist_ok=True)
        tied = {"lm_head.weight"} if family == "gemma3_text" else set()
        state = {name: value for name, value in state.items() if not any(name.endswith(each) for each in tied)}
        assert_refused(save(folder, state, family), message)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_adapters_in_a_model_are_named(family, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q_proj"] if family == "llama" else ["query"]
    model = peft.get_peft_model(their_model(family), peft.LoraConfig(target_modules=targets, r=2))
    message = "adapter that is not merged into its model: save what PEFT's merge_and_unload"
    assert_refused(save(tmp_path, model.state_dict(), family), message)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    assert_refused(tmp_path, "neither .* is there; it holds an adapter of PEFT: name its base model")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFileError, match="no such file; adapter_config.json says that this is an adapter of PEFT"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", _VALUES)
def test_weights_of_every_other_family_are_named(family, tmp_path):
    config = read_config(write(tmp_path, _VALUES[family]))
    expected = {common_name(entry.name, config) for entry in tensor_table(config)}
    own = {common_name(name, config) for name in names_of(family)}
    assert own - {"lm_head.weight"} == expected - {"lm_head.weight"}
    encoders = {"bert", "roberta"}
    for other in _VALUES:
        hint = name_hint(names_of(other), expected, config)
        if other == family or {family, other} == {"llama", "mistral"} or {family, other} == encoders:
            assert "look like" not in hint
            assert "they are of" not in hint
        elif other in encoders:
            assert hint.startswith("; they are of an encoder such as BERT")
        elif family in encoders:
            assert hint.startswith("; they are of a decoder such as Llama")
        elif not (family == "qwen2" and other in ("llama", "mistral")) and other != "qwen2":
            wanted = "llama or mistral" if other in ("llama", "mistral") else other
            assert hint == f"; they look like those of a {wanted}, and config.json says model_type = '{family}'"
        elif family in ("llama", "mistral"):  # qwen2's weights differ by biases alone
            assert hint in ("; config.json would have to say attention_bias = true", "; a mistral never has them")


def test_an_encoder_with_the_prefix_of_another_is_named(tmp_path):
    state = their_model("roberta", "RobertaForSequenceClassification").state_dict()
    message = "they are of a roberta, and config.json says model_type = 'bert'"
    assert_refused(save(tmp_path, state, "bert"), message)
    state = {f"0.auto_model.{name}": value for name, value in their_model("bert").state_dict().items()}
    assert_refused(save(tmp_path, state, "bert"), "'auto_model.', which sentence-transformers puts there")


def biased(family, kind=None, **changes):
    return their_model(family, kind, **changes).state_dict()


@pytest.mark.parametrize(
    ("state", "family", "changes", "message"),
    [
        (lambda: biased("llama", attention_bias=True), "llama", {}, "would have to say attention_bias = true"),
        (lambda: biased("llama"), "llama", {"attention_bias": True}, "would have to say attention_bias = false"),
        (lambda: biased("llama", mlp_bias=True), "llama", {}, "config.json would have to say mlp_bias = true"),
        (lambda: biased("llama", attention_bias=True), "mistral", {}, "a mistral never has them"),
        (
            lambda: biased("llama", num_hidden_layers=3),
            "llama",
            {},
            "3 layers, and config.json says num_hidden_layers = 2",
        ),
        (
            lambda: biased("bert", num_hidden_layers=1),
            "bert",
            {},
            "1 layers, and config.json says num_hidden_layers = 2",
        ),
        (lambda: biased("llama", "LlamaForSequenceClassification"), "llama", {}, "score.weight is the head of a class"),
        (lambda: biased("llama"), "llama", {"vocab_size": 39}, "the field vocab_size does not fit these weights"),
        (lambda: biased("llama"), "llama", {"intermediate_size": 16}, "the field intermediate_size does not fit"),
        (lambda: biased("llama"), "llama", {"num_key_value_heads": 4}, r"field num_key_value_heads \* head_dim does"),
        (lambda: biased("qwen3"), "qwen3", {"head_dim": 4}, "the field .*head_dim.* does not fit these weights"),
        (lambda: biased("bert"), "bert", {"max_position_embeddings": 9}, "the field max_position_embeddings does not"),
        (
            lambda: {name: value for name, value in biased("bert").items() if "pooler" not in name},
            "bert",
            {},
            "the checkpoint was saved without a pooler",
        ),
    ],
)
def test_the_field_that_does_not_fit_is_named(state, family, changes, message, tmp_path):
    assert_refused(save(tmp_path, state(), family, **changes), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "the weights are quantised"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "the weights are quantised"),
        ("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "the weights are quantised"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "they are of a mixture of experts"),
        ("model.layers.0.self_attn.qkv_proj.weight", "they are of a model with joined projections, such as Phi-3"),
        ("model.vision_tower.encoder.layers.0.weight", "they are of a multimodal model"),
        ("transformer.h.0.attn.c_attn.weight", "they are of another family, such as GPT-2"),
        ("v_head.summary.weight", "v_head.summary.weight is of a model with a value head"),
    ],
)
def test_other_kinds_of_weights_are_named(name, message, tmp_path):
    state = their_model("llama").state_dict()
    assert_refused(save(tmp_path, {**state, name: torch.ones(2)}, "llama"), message)


def test_the_language_model_of_a_multimodal_one_is_named(tmp_path):
    for prefix in ("language_model.", "model.language_model."):
        state = {
            f"{prefix}{name.removeprefix('model.')}": each for name, each in their_model("qwen3").state_dict().items()
        }
        assert_refused(save(tmp_path, state, "qwen3"), "multimodal model, of which only its language_model is read")


def test_folders_of_other_formats_are_named(tmp_path):
    write(tmp_path, _VALUES["llama"])
    for file, message in (
        ("model.gguf", "model.gguf is of another format"),
        ("consolidated.safetensors", "consolidated.safetensors is of another format"),
        ("model.fp16.safetensors", "model.fp16.safetensors is there: if it is the whole model, name it model.saf"),
        ("weights.pth", "weights.pth is a pickle and is never opened"),
    ):
        (tmp_path / file).write_bytes(b"")
        assert_refused(tmp_path, message)
        (tmp_path / file).unlink()


def test_no_hint_where_nothing_is_known():
    config = read_config_of("llama")
    expected = {entry.name for entry in tensor_table(config)}
    for missing in itertools.islice(sorted(expected - {"lm_head.weight"}), 3):
        assert name_hint(expected - {missing}, expected, config) == ""


def read_config_of(family):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return read_config(write(Path(folder), _VALUES[family]))
