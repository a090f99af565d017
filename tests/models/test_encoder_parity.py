"""Encoders against transformers' on random tiny models of every family, and MiniLM's real weights."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.models import (
    Encoder,
    ModelFileError,
    abstract_params,
    add_head,
    config_to_hf,
    load_params,
    mean_embedding,
    read_config,
    save_params,
    with_head,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

VOCAB, ROWS, LENGTH = 47, 3, 14
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "attn_implementation": "eager",
    "num_labels": 3,
}
# id -> (transformers' configuration class, its model class, what differs from SIZES, our output beside hidden states)
FAMILIES = {
    "bert": ("BertConfig", "BertModel", {}, "pooled"),
    "bert_classifier": ("BertConfig", "BertForSequenceClassification", {"hidden_act": "relu"}, "logits"),
    "roberta": ("RobertaConfig", "RobertaModel", {"type_vocab_size": 1}, "pooled"),
    "roberta_classifier": ("RobertaConfig", "RobertaForSequenceClassification", {"type_vocab_size": 2}, "logits"),
}


def torch_model(name):
    settings, kind, changes, _ = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, kind)(getattr(transformers, settings)(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter_name.endswith("LayerNorm.weight") else 0.0, 0.2)
    return model


def jitted(config, output):
    encoder = Encoder(config)
    return jax.jit(
        lambda params, *inputs: (
            encoder.apply({"params": params}, *inputs, output="hidden"),
            encoder.apply({"params": params}, *inputs, output=output),
        )
    )


class Pair:
    """One model twice: transformers', and ours read from the directory that transformers wrote."""

    def __init__(self, name, directory):
        self.name, self.directory, self.output = name, directory, FAMILIES[name][3]
        self.torch_model = torch_model(name)
        self.torch_model.save_pretrained(directory)
        self.config = read_config(directory)
        self.params = load_params(directory, self.config)
        self.forward = jitted(self.config, self.output)

    def theirs(self, ids, mask=None, kinds=None, positions=None):
        """(hidden states, pooled or logits)."""
        given = {"attention_mask": mask, "token_type_ids": kinds, "position_ids": positions}
        given = {name: torch.tensor(value) for name, value in given.items() if value is not None}
        with torch.no_grad():
            found = self.torch_model(torch.tensor(ids), output_hidden_states=True, **given)
        other = found.logits if self.output == "logits" else found.pooler_output
        return found.hidden_states[-1].numpy(), other.numpy()


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(2, VOCAB, (ROWS, LENGTH))  # 0 and 1 are the families' padding


def close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4, rtol=0)


def test_plain_rows_with_two_kinds_of_text(pair, ids):
    kinds = np.zeros_like(ids)
    if pair.config.type_vocab_size > 1:
        kinds[:, LENGTH // 2 :] = 1
    ours = pair.forward(pair.params, ids, None, None, kinds)
    assert np.std(ours[1]) > 0.1
    close(ours, pair.theirs(ids, kinds=kinds))


def test_padding_at_the_right(pair, ids):
    mask = (np.arange(LENGTH)[None] < np.array([LENGTH, 9, 4])[:, None]).astype(int)
    padded = np.where(mask > 0, ids, 1 if "roberta" in pair.name else 0)
    ours = pair.forward(pair.params, padded, None, mask, None)
    theirs = pair.theirs(padded, mask)
    real = mask.astype(bool)
    close((np.asarray(ours[0])[real], ours[1]), (theirs[0][real], theirs[1]))


def test_padding_changes_nothing_on_either_side(pair, ids):
    short = pair.forward(pair.params, ids[:, :6], None, None, None)
    for before in (0, 3, LENGTH - 6):
        row, mask = np.full_like(ids, 7), np.zeros_like(ids)
        row[:, before : before + 6], mask[:, before : before + 6] = ids[:, :6], 1
        found = pair.forward(pair.params, row, None, mask, None)
        close((found[0][:, before : before + 6], found[1]), short)


def test_three_packed_segments_equal_three_runs(pair, ids):
    lengths = (5, 3, 4)  # and two tokens of padding
    segments = np.tile(np.repeat([1, 2, 3, 0], [*lengths, LENGTH - sum(lengths)]), (ROWS, 1))
    hidden = pair.forward(pair.params, ids, None, segments, None)[0]
    start = 0
    for length in lengths:
        piece = ids[:, start : start + length]
        np.testing.assert_allclose(
            hidden[:, start : start + length], pair.theirs(piece)[0], atol=1e-4, rtol=0, err_msg=str(start)
        )
        start += length


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier"])
def test_gradients_of_a_classifier_equal_torch(name, ids, tmp_path):
    """Of every parameter, by the mean loss over classes that training has."""
    from safetensors.torch import save_file

    pair, classes = Pair(name, tmp_path), np.array([2, 0, 1])
    torch.nn.functional.cross_entropy(pair.torch_model(torch.tensor(ids)).logits, torch.tensor(classes)).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in pair.torch_model.named_parameters()}
    save_file(gradients, tmp_path / "model.safetensors")

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = Encoder(pair.config).apply({"params": params}, ids, output="logits")
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(classes)[:, None], axis=-1).mean()

    theirs = load_params(tmp_path, pair.config)
    jax.tree.map_with_path(
        lambda path, ours, wanted: np.testing.assert_allclose(
            ours, wanted, atol=1e-5 + 1e-4 * np.abs(wanted).max(), rtol=0, err_msg=str(path)
        ),
        gradient(pair.params),
        theirs,
    )
    assert min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs["encoder"]["layer"]["output"])) > 1e-4


def test_loop_and_remat_equal_scan(pair, ids):
    loop = replace(pair.config, scan_layers=False, remat="full")
    params = load_params(pair.directory, loop)
    assert {"layer_0", "layer_1", "layer_2"} <= set(params["encoder"])
    close(jitted(loop, pair.output)(params, ids), pair.forward(pair.params, ids))


def test_transformers_reads_what_we_save(pair, ids, tmp_path):
    out = tmp_path / "saved"
    save_params(pair.params, pair.config, out)
    again = type(pair.torch_model).from_pretrained(out)
    theirs, first = again.state_dict(), pair.torch_model.state_dict()
    assert theirs.keys() == first.keys()
    assert all(torch.equal(theirs[name], first[name]) for name in first)
    assert again.config.architectures == pair.torch_model.config.architectures
    assert read_config(out) == pair.config


def test_a_classifier_may_be_put_on_any_of_them(pair, ids, tmp_path):
    """Saved beside the base's own config.json, it is a classifier to transformers, with the same logits."""
    config = with_head(pair.config, ("no", "maybe", "yes", "never"))
    bare = {name: tree for name, tree in pair.params.items() if name != "classifier"}
    if not config.pooler:
        bare.pop("pooler", None)
    if config.pooler and "pooler" not in bare:
        pytest.fail("a BERT classifier has a pooler already")
    params = add_head(bare, config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(config))
    out = tmp_path / "classifier"
    save_params(params, config, out, source_dir=pair.directory)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.id2label == dict(enumerate(config.labels))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    found = Encoder(config).apply({"params": params}, ids, output="logits")
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    assert read_config(out) == config


@pytest.mark.parametrize(
    ("settings", "kind"), [("BertConfig", "BertForPreTraining"), ("RobertaConfig", "RobertaForMaskedLM")]
)
def test_the_heads_of_pretraining_are_left_out(ids, tmp_path, caplog, settings, kind):
    model = getattr(transformers, kind)(getattr(transformers, settings)(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    params = load_params(tmp_path, config)
    assert "left out" in caplog.text
    with torch.no_grad():
        theirs = model(torch.tensor(ids), output_hidden_states=True).hidden_states[-1].numpy()
    ours = Encoder(config).apply({"params": params}, ids, output="hidden")
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_named(pair, ids, tmp_path):
    values = config_to_hf(pair.config)
    for name, value, named in (
        ("is_decoder", True, "is_decoder"),
        ("hidden_act", "mish", "hidden_act"),
        ("architectures", ["BertForQuestionAnswering"], "architectures"),
        ("num_attention_heads", 5, "5 heads"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, name: value}))
        with pytest.raises(ModelFileError, match=named):
            read_config(tmp_path)
    long = jnp.ones((1, pair.config.max_length + 1), jnp.int32)
    with pytest.raises(ValueError, match="position table"):
        Encoder(pair.config).apply({"params": pair.params}, long)
    with pytest.raises(ValueError, match="output must be"):
        Encoder(pair.config).apply({"params": pair.params}, ids, output="words")


@pytest.fixture(scope="module")
def minilm(minilm_folder):
    folder = minilm_folder
    config = read_config(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = [
        "A man is eating food.",
        "Someone is having a meal.",
        "The stock market fell sharply today.",
        "A cat sleeps on the warm window sill while it is raining outside in the garden.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    return folder, config, load_params(folder, config), dict(batch)


def test_minilm_equals_transformers(minilm):
    folder, config, params, batch = minilm
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216
    ours = jitted(config, "pooled")(params, batch["input_ids"], None, batch["attention_mask"], batch["token_type_ids"])
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        theirs = model(**{name: torch.tensor(array) for name, array in batch.items()})
    real = batch["attention_mask"].astype(bool)
    close(
        (np.asarray(ours[0])[real], ours[1]),
        (theirs.last_hidden_state.numpy()[real], theirs.pooler_output.numpy()),
    )


def test_minilm_tells_paraphrases_from_unrelated_sentences(minilm):
    _, config, params, batch = minilm
    hidden = Encoder(config).apply(
        {"params": params}, batch["input_ids"], None, batch["attention_mask"], output="hidden"
    )
    vectors = np.asarray(mean_embedding(hidden, jnp.asarray(batch["attention_mask"])))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.6
    assert np.abs(similar[:2, 2:]).max() < 0.12


def test_minilm_has_the_similarities_that_are_published(minilm):
    """Those that sbert.net prints for this model and these sentences, to their four digits."""
    folder, config, params, _ = minilm
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    batch = transformers.AutoTokenizer.from_pretrained(str(folder))(texts, padding=True, return_tensors="np")
    mask = jnp.asarray(batch["attention_mask"])
    hidden = Encoder(config).apply({"params": params}, batch["input_ids"], None, mask, output="hidden")
    vectors = np.asarray(mean_embedding(hidden, mask))
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, published, atol=1e-4, rtol=0)
