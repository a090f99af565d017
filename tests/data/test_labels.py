"""A label is the same class in every format: by the name of a class, else by its number."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mor_jax.data import DataError, DataSource, load_labelled
from tests.cli.tiny_bert import make_tokenizer

FORMATS = ("jsonl", "csv", "tsv", "parquet", "folder")


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


def write(folder, form, labels, cells=None):
    """The labels, each beside the text "red", as a file of the format; `cells` is how a table spells them."""
    path = folder / ("data" if form == "folder" else f"data.{form}")
    columns = {"text": ["red"] * len(labels), "label": labels}
    if form == "jsonl":
        path.write_text("".join(json.dumps({"text": "red", "label": label}) + "\n" for label in labels))
    elif form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        path.write_text(
            "".join(
                f"{text}{mark}{cell}\n"
                for text, cell in [("text", "label")] + [("red", cell) for cell in cells or map(str, labels)]
            )
        )
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(path)
    return str(path)


def load(path, words, labels=()):
    found, names = load_labelled([DataSource(path)], words, 8, labels=labels)
    assert found.labels is not None
    return names, found.labels.tolist()


CASES = {
    "numbers": ([1, 0, 1], None, (), ("0", "1"), [1, 0, 1]),
    "ids of named classes": ([1, 0, 1], None, ("bad", "good"), ("bad", "good"), [1, 0, 1]),
    "names of numbers": ([7, 5, 7], None, ("5", "7"), ("5", "7"), [1, 0, 1]),
    "names before ids": ([1, 0], None, ("1", "0"), ("1", "0"), [0, 1]),
    "numbers in order": ([10, 2, 1], None, (), ("1", "2", "10"), [2, 1, 0]),
    "whole fractions": ([1.0, 0.0, 1.0], None, (), ("0", "1"), [1, 0, 1]),
    "whole fractions as ids": ([1.0, 0.0], None, ("bad", "good"), ("bad", "good"), [1, 0]),
    "named fractions": ([2.5, 1.5], None, ("1.5", "2.5"), ("1.5", "2.5"), [1, 0]),
    "truth": ([True, False], None, (), ("false", "true"), [1, 0]),
    "truth in small letters": ([True, False], ["true", "false"], (), ("false", "true"), [1, 0]),
    "truth by name": ([True, False], None, ("True", "False"), ("True", "False"), [0, 1]),
    "truth by number": ([True, False], None, ("0", "1"), ("0", "1"), [1, 0]),
    "truth by id": ([True, False], None, ("bad", "good"), ("bad", "good"), [1, 0]),
    "words": (["yes", "no", "007"], None, (), ("007", "no", "yes"), [2, 1, 0]),
    "words of truth": (["true", "unknown", "false"], None, (), ("false", "true", "unknown"), [1, 2, 0]),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_label_is_the_same_class_in_every_format(tmp_path, words, case, form):
    labels, cells, given, names, ids = CASES[case]
    assert load(write(tmp_path, form, labels, cells), words, given) == (names, ids)


BAD = {
    "unlabelled": ([0, 1, -1], (), ":4|row 3"),
    "unlabelled beside names": ([0, 1, -1], ("bad", "good"), ":4|row 3"),
    "a score": ([2.5, 3.25], (), ":2|row 1"),
    "beyond the classes": ([0, 2], ("bad", "good"), ":3|row 2"),
    "no class": (["good", "gut"], ("bad", "good"), ":3|row 2"),
    "missing": (["good", None], ("bad", "good"), ":3|row 2"),
}
SAID = {
    "unlabelled": "-1 marks a record without one",
    "unlabelled beside names": "-1 marks a record without one",
    "a score": "2.5 .*is a score",
    "beyond the classes": "'2' is not one of bad, good",
    "no class": "'gut' is not one of bad, good",
    "missing": "the field 'label' is missing or empty",
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", BAD)
def test_a_label_that_is_no_class_is_refused_in_every_format(tmp_path, words, case, form):
    labels, given, place = BAD[case]
    path = write(tmp_path, form, labels, ["" if label is None else str(label) for label in labels])
    line = place.split("|")[0] if form in ("csv", "tsv") else place.split("|")[1]
    if form == "jsonl":
        line = f":{int(line.split()[1])}"
    with pytest.raises(DataError, match=f"data.*{line}: .*{SAID[case]}"):
        load(path, words, given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1], {"a": 1}])
def test_what_is_no_label_at_all(write_jsonl, words, value):
    path = write_jsonl([{"text": "red", "label": "a"}, {"text": "red", "label": value}])
    with pytest.raises(DataError, match=r"data.jsonl:2: the field 'label' must be a whole number or a name"):
        load(path, words)


def test_minus_one_may_be_named(write_jsonl, words):
    path = write_jsonl([{"text": "red", "label": label} for label in (-1, 1, -1)])
    assert load(path, words, ("-1", "1")) == (("-1", "1"), [0, 1, 0])


def with_names(folder, form, names, labels):
    """A dataset whose label column knows the names of its classes."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": ["red"] * len(labels), "label": labels}
    dataset, path = datasets.Dataset.from_dict(columns, features=features), folder / f"named.{form}"
    dataset.to_parquet(path) if form == "parquet" else dataset.save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_classes_that_the_column_names(tmp_path, words, form):
    """As in GLUE's MRPC: the names in the order of the ids, those that do not occur included."""
    path = with_names(tmp_path, form, ["unlike", "alike", "unsure"], [1, 0, 1])
    assert load(path, words) == (("unlike", "alike", "unsure"), [1, 0, 1])
    assert load(path, words, ("alike", "unlike")) == (("alike", "unlike"), [0, 1, 0])  # by name
    assert load(path, words, ("LABEL_0", "LABEL_1")) == (("LABEL_0", "LABEL_1"), [1, 0, 1])  # else by id
    unlabelled = with_names(tmp_path / "test", form, ["unlike", "alike"], [-1, -1])
    with pytest.raises(DataError, match="row 1: .*-1 marks a record without one"):
        load(unlabelled, words)


def test_columns_that_name_classes_in_another_order_agree_by_name(tmp_path, words):
    paths = [with_names(tmp_path / name, "parquet", names, [0, 1]) for name, names in (("a", ["x", "y"]), ("b", "yx"))]
    found, names = load_labelled([DataSource(path) for path in paths], words, 8)
    assert names == ("x", "y")
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, [0, 1, 1, 0])
