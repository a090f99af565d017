"""Labelled texts as flat arrays: classes, pairs, what is counted, and what is named; all of it streamed."""

import json
import tracemalloc

import numpy as np
import pytest

from mor_jax.data import DataError, DataSource, build_row, load_labelled
from tests.cli.tiny_bert import make_tokenizer

PAIRS = [
    {"sentence1": "red house", "sentence2": "the boat is big", "label": "b"},
    {"sentence1": "old", "sentence2": "blue", "label": "a"},
    {"sentence1": "green boat", "label": "b"},
    {"text": "small house is old", "label": "a"},
]


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


def test_examples_are_the_tokenizers_own(write_jsonl, words):
    found, names = load_labelled([DataSource(write_jsonl(PAIRS), "task")], words, 16)
    assert names == ("a", "b")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1, 0]
    encoded = [words(*(r[f] for f in ("text", "sentence1", "sentence2") if f in r)) for r in PAIRS]
    assert found.lengths.tolist() == [len(each["input_ids"]) for each in encoded]
    for number, each in enumerate(encoded):
        row = build_row(found, np.array([number]), 16)
        size = len(each["input_ids"])
        assert row["input_ids"][:size].tolist() == each["input_ids"]
        assert row["token_type_ids"][:size].tolist() == each["token_type_ids"]
        assert row["targets"][0] == found.labels[number]
        assert row["loss_mask"].tolist() == [1] + [0] * 15
    assert not found.learned.any()
    assert found.tasks == ("task",)


@pytest.mark.parametrize("field", ["text", "sentence", "sentence1"])
def test_one_text_may_stand_in_any_of_three_fields(tmp_path, tokenizer, field):
    path = tmp_path / "rows.jsonl"
    rows = [{field: "abc", "label": "good"}, {field: "defgh", "label": "bad"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, labels = load_labelled([DataSource(str(path))], tokenizer, 16)
    assert labels == ("bad", "good")
    np.testing.assert_array_equal(examples.labels, [1, 0])
    encoded = [tokenizer(row[field])["input_ids"] for row in rows]
    np.testing.assert_array_equal(examples.tokens, np.concatenate(encoded))


@pytest.mark.parametrize(
    ("values", "given", "names", "ids"),
    [
        ([1, 0, 1], (), ("0", "1"), [1, 0, 1]),
        ([True, False, 1], (), ("0", "1"), [1, 0, 1]),
        (["yes", "no", 3], (), ("3", "no", "yes"), [2, 1, 0]),
        ([1, 0, "no"], ("no", "yes"), ("no", "yes"), [1, 0, 0]),
        ([7, 5, 7], ("5", "7"), ("5", "7"), [1, 0, 1]),
    ],
)
def test_labels_are_names_or_numbers(write_jsonl, words, values, given, names, ids):
    path = write_jsonl([{"text": "red", "label": value} for value in values])
    found, own = load_labelled([DataSource(path)], words, 8, labels=given)
    assert own == names
    assert found.labels is not None
    assert found.labels.tolist() == ids


def test_overlong_examples_are_cut_dropped_or_named(write_jsonl, words):
    path = write_jsonl([*PAIRS, {"text": "red " * 20, "label": "a"}])
    cut = load_labelled([DataSource(path)], words, 10)[0]
    assert cut.lengths.max() == 10
    assert cut.tokens[-1] == words.sep_token_id  # cut by the tokenizer, which closes what is left
    assert (cut.truncated, cut.dropped, len(cut)) == (1, 0, 5)
    dropped = load_labelled([DataSource(path)], words, 10, "drop")[0]
    assert (dropped.truncated, dropped.dropped, len(dropped)) == (0, 1, 4)
    with pytest.raises(DataError, match=r"data.jsonl:5: 22 tokens, more than 10"):
        load_labelled([DataSource(path)], words, 10, "error")
    with pytest.raises(DataError, match="none of its 5 examples can be used: 5 are over 2 tokens"):
        load_labelled([DataSource(path)], words, 2, "drop")


def test_a_label_that_is_no_class_is_named_with_its_first_place(write_jsonl, words):
    path = write_jsonl([*PAIRS, {"text": "red", "label": "c"}, {"text": "blue", "label": "c"}])
    with pytest.raises(DataError, match=r"data.jsonl:5: the label 'c' is not one of a, b"):
        load_labelled([DataSource(path)], words, 16, labels=("a", "b"))
    with pytest.raises(DataError, match="at least two classes, found a"):
        load_labelled([DataSource(write_jsonl([PAIRS[1]]))], words, 16)


@pytest.mark.parametrize("field", ["sentence1", "sentence2", "label"])
def test_half_of_a_surrogate_pair_is_named_with_its_field(write_jsonl, words, field):
    path = write_jsonl([PAIRS[0], PAIRS[1] | {field: "a\ud83d"}])
    with pytest.raises(DataError, match=f"^{path}:2: the field '{field}': character 2 is half of a broken pair"):
        load_labelled([DataSource(path)], words, 16)


def test_a_file_need_not_fit_into_memory(tmp_path, words):
    """What Python and NumPy allocate while reading stays under what the tokens take."""
    path, scratch = tmp_path / "large.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    line = json.dumps({"sentence1": "red house " * 100, "sentence2": "big boat " * 100, "label": 0}) + "\n"
    path.write_text(line * 300 + line.replace('"label": 0', '"label": 1'))
    load_labelled([DataSource(str(path))], words, 512, scratch=scratch)  # imports and caches are not counted
    tracemalloc.start()
    try:
        found = load_labelled([DataSource(str(path))], words, 512, scratch=scratch)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 301
    assert peak < found.tokens.nbytes / 2
    assert not list(scratch.iterdir())  # nothing is left behind
