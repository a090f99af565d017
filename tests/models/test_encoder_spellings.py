"""Every spelling of an encoder's config.json means to us what it means to transformers, or both refuse it."""

import itertools

import numpy as np
import pytest
from spellings import ABSENT, DTYPES, SILENT
from transformers_reading import POINTS, forward_or_error, read_or_error, write

from mor_jax.models import ModelFileError
from mor_jax.models.layers import ACTIVATION_FUNCTIONS
from mor_jax.models.tensors import common_name, tensor_table

pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

_PREFIXES = {"bert": "Bert", "roberta": "Roberta"}
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_FIELDS = [
    *({name: None} for name in (*_SIZES, "type_vocab_size", "layer_norm_eps", "hidden_act", "initializer_range")),
    *({name: None} for name in ("is_decoder", "add_cross_attention", "position_embedding_type", "architectures")),
    *({name: ABSENT} for name in ("max_position_embeddings",)),
    {"type_vocab_size": 1},
    {"type_vocab_size": 0},
    {"layer_norm_eps": 1e-3},
    {"layer_norm_eps": 1},
    {"hidden_size": 18},
    {"hidden_size": 16.0},
    {"pad_token_id": None},
    {"pad_token_id": 5},
    {"pad_token_id": -1},
    {"pad_token_id": 40},
    {"add_cross_attention": True},
    {"is_decoder": 1},
    {"is_causal": False},
    {"position_embedding_type": "absolute"},
    {"position_embedding_type": "relative_key"},
    {"per_layer_config": {"0": {"hidden_act": "relu"}}},
    {"rope_theta": 5.0, "sliding_window": 2, "head_dim": 8, "num_key_value_heads": 2},
    *({"hidden_act": name} for name in ("relu", "gelu_new", "gelu_python", "swish", "nope")),
    *({"hidden_dropout_prob": value} for value in (None, "0", 0)),
    *({"attention_probs_dropout_prob": value} for value in (None, 0)),
    *({"classifier_dropout": value} for value in (None, "0", 0)),
    *({"tie_word_embeddings": value} for value in (None, 1, False)),
    *DTYPES,
    *(change for change in SILENT if "attention_dropout" not in change),
]
_LABELS = [
    {},
    {"num_labels": 3},
    {"num_labels": None},
    {"num_labels": "3"},
    {"num_labels": 3.0},
    {"id2label": None},
    {"id2label": {"0": "no", "1": "yes"}},
    {"id2label": {"1": "yes", "0": "no"}, "num_labels": 2},
    {"id2label": {"0": "no", "1": "yes"}, "num_labels": 3},
    {"id2label": {"0": "no", "1": "yes"}, "num_labels": None},
    {"id2label": {"no": 0}},
    {"id2label": ["no", "yes"]},
    {"label2id": {"a": 0, "b": 1, "c": 2}},
    {"problem_type": None},
    {"problem_type": "single_label_classification", "id2label": {"0": "one"}},
]


def torch_encoder(folder, classifier):
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModel
    return forward_or_error(
        lambda: kind.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager"), range(3, 12)
    )


def check(folder, family, change, classifier=False):
    import torch

    values = {"model_type": family, **_SIZES, **change}
    values |= {"architectures": [f"{_PREFIXES[family]}ForSequenceClassification"]} if classifier else {}
    write(folder, {name: value for name, value in values.items() if value is not ABSENT})
    model, ours = torch_encoder(folder, classifier), read_or_error(folder)
    if isinstance(ours, ModelFileError):
        assert isinstance(model, Exception), f"{values}: {ours}"
        return "refused"
    assert not isinstance(model, Exception), f"{values}: we read it, transformers raises {model!r}"
    theirs = {common_name(name, ours): tuple(value.shape) for name, value in model.state_dict().items()}
    assert {common_name(entry.name, ours): entry.shape for entry in tensor_table(ours)} == theirs, values
    base = getattr(model, family) if classifier else model
    assert ours.layer_norm_eps == base.embeddings.LayerNorm.eps
    assert ours.position_offset == (base.config.pad_token_id + 1 if family == "roberta" else 0)
    act = base.encoder.layer[0].intermediate.intermediate_act_fn(torch.tensor(POINTS)).numpy()
    np.testing.assert_allclose(ACTIVATION_FUNCTIONS[ours.hidden_act](POINTS), act, atol=1e-6)
    if classifier:
        assert dict(enumerate(ours.labels)) == model.config.id2label, values
    return "same"


@pytest.mark.parametrize("family", _PREFIXES)
def test_fields_of_an_encoder(family, tmp_path):
    assert {check(tmp_path, family, change) for change in _FIELDS} == {"same", "refused"}


@pytest.mark.parametrize("family", _PREFIXES)
def test_names_of_classes(family, tmp_path):
    """Beside one other field, so that several are read at once."""
    beside = itertools.cycle([{}, {"type_vocab_size": 1}, {"hidden_act": "relu"}, {"dtype": "bfloat16"}])
    found = {check(tmp_path, family, change | more, True) for change, more in zip(_LABELS, beside, strict=False)}
    assert found == {"same", "refused"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "field 'is_decoder' is true; only bidirectional encoders"),
        ({"num_labels": 1}, "field 'num_labels' is 1, which is a regression"),
        ({"id2label": {"0": "one"}}, "field 'id2label' must name at least two classes"),
        (
            {"id2label": {"1": "a", "2": "b"}},
            r"field 'id2label' must name at least two classes 0, 1, ...; got \[1, 2\]",
        ),
        ({"problem_type": "regression"}, "field 'problem_type' is 'regression'; only single_label_classification"),
        ({"architectures": ["BertForTokenClassification"]}, "field 'architectures' names 'BertForTokenClassification'"),
    ],
)
def test_what_only_we_refuse_is_named(change, message, tmp_path):
    classifier = {"architectures": ["BertForSequenceClassification"]}
    error = read_or_error(write(tmp_path, {"model_type": "bert", **_SIZES, **classifier, **change}))
    assert isinstance(error, ModelFileError)
    with pytest.raises(ModelFileError, match=message):
        raise error
