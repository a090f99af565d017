"""A mixture as flat arrays: nothing lost, nothing uncounted, task ids, and damage named by file and line."""

import hashlib
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from mor_jax.data import DataError, DataSource, load_examples, make_iterator, make_plan


@pytest.fixture
def mixture(write_jsonl):
    first = write_jsonl([{"text": "a" * n} for n in (3, 9, 4)], "first.jsonl")
    second = write_jsonl([{"prompt": "p" * n, "completion": "cc"} for n in (1, 5, 20)], "second.jsonl")
    third = write_jsonl([{"text": "z"}, {"text": ""}], "third.jsonl")
    return DataSource(first, "x"), DataSource(second, "y", 2.0), DataSource(third, "x")


def test_flat_arrays(mixture, tokenizer):
    found = load_examples(mixture, tokenizer, 100)
    texts = [tokenizer.decode(found.tokens[a:b]) for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
    ends = ["aaa", "a" * 9, "aaaa", "pcc", "pppppcc", "p" * 20 + "cc", "z"]
    assert texts == [text + "<|im_end|>" for text in ends]
    assert found.lengths.tolist() == [len(text) + 1 for text in ends]
    assert found.prompt_lengths.tolist() == [0, 0, 0, 1, 5, 20, 0]
    assert found.source_ids.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert found.tasks == ("x", "y")
    assert found.task_ids.tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert [c.read for c in found.counts] == [3, 3, 2]
    assert found.empty == 1  # "" is its end token alone, which nothing predicts
    assert len(found) == 7


@pytest.mark.parametrize(
    ("overlong", "lengths", "counts"),
    [
        ("truncate", [4, 6, 5, 4, 6, 2], [(3, 3, 1, 0, 0), (3, 2, 1, 1, 0), (2, 1, 0, 0, 1)]),
        ("drop", [4, 5, 4, 2], [(3, 2, 0, 1, 0), (3, 1, 0, 2, 0), (2, 1, 0, 0, 1)]),
    ],
)
def test_overlong_examples_are_counted(mixture, tokenizer, overlong, lengths, counts):
    found = load_examples(mixture, tokenizer, 6, overlong)  # the prompt of 20 leaves nothing to learn in 6 tokens
    assert found.lengths.tolist() == lengths
    assert [(c.read, c.kept, c.truncated, c.dropped, c.empty) for c in found.counts] == counts
    assert all(c.read == c.kept + c.dropped + c.empty for c in found.counts)
    assert (found.truncated, found.dropped) == tuple(np.sum(counts, axis=0)[2:4])


def test_truncation_keeps_the_beginning(mixture, tokenizer):
    whole, cut = (load_examples(mixture[1:2], tokenizer, length) for length in (100, 6))
    second = whole.tokens[whole.offsets[1] :][:6]
    np.testing.assert_array_equal(cut.tokens[cut.offsets[1] : cut.offsets[2]], second)
    assert cut.learned[cut.offsets[1] : cut.offsets[2]].tolist() == [False] * 5 + [True]


def test_overlong_may_be_an_error(mixture, tokenizer):
    with pytest.raises(DataError, match=r"first.jsonl:2: 10 tokens, more than 6"):
        load_examples(mixture, tokenizer, 6, "error")


def test_a_bad_record_stops_with_its_line(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "a"}, {"text": "b"}, {"prompt": "c"}])
    with pytest.raises(DataError, match=f"^{path}:3: has the fields prompt"):
        load_examples([DataSource(path)], tokenizer, 10)
    path = write_jsonl([{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(DataError, match=f"^{path}:2: the field 'text' must be text, found list"):
        load_examples([DataSource(path)], tokenizer, 10)


def test_task_ids_may_be_those_of_other_data(mixture, tokenizer):
    found = load_examples(mixture[1:], tokenizer, 100, tasks=("x", "unused", "y"))
    assert found.task_ids.tolist() == [2, 2, 2, 0]
    assert found.tasks == ("x", "unused", "y")
    with pytest.raises(DataError, match="the task 'y' is not one of x"):
        load_examples(mixture, tokenizer, 100, tasks=("x",))


def test_the_fingerprint_follows_content_not_names(mixture, tokenizer, tmp_path):
    first = load_examples(mixture[:1], tokenizer, 100)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps([{"text": "a" * n} for n in (3, 9, 4)]))
    assert load_examples([DataSource(str(copy), "x")], tokenizer, 100).fingerprint == first.fingerprint
    others = [
        load_examples(mixture[:1], tokenizer, 6),
        load_examples([DataSource(str(copy), "other")], tokenizer, 100),
        load_examples([*mixture[:1], *mixture[:1]], tokenizer, 100),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_nothing_to_learn_from(write_jsonl, tokenizer):
    path = write_jsonl([{"text": ""}, {"prompt": "p" * 9, "completion": "c"}])
    with pytest.raises(DataError, match="none of its 2 examples can be used: 1 are over 5 tokens, 1 have nothing"):
        load_examples([DataSource(path)], tokenizer, 5)
    with pytest.raises(DataError, match="no data was named"):
        load_examples([], tokenizer, 5)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        load_examples([DataSource(path)], tokenizer, 1)
    with pytest.raises(ValueError, match="overlong must be one of"):
        load_examples([DataSource(path)], tokenizer, 5, "cut")


def test_a_mixture_need_not_fit_into_memory(write_jsonl, tokenizer, tmp_path):
    """What Python and NumPy allocate while reading and hashing stays far under what tokens and masks take."""
    path = write_jsonl({"text": "a" * 3000} for _ in range(300))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    load_examples([DataSource(path)], tokenizer, 2048, scratch=scratch)  # imports and caches are not counted
    tracemalloc.start()
    try:
        found = load_examples([DataSource(path)], tokenizer, 2048, scratch=scratch)
        assert len(found.fingerprint) == 64
        plan = make_plan(found, 4096)
        batch = next(make_iterator(found, plan, 2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.tokens) == 300 * 2048
    assert peak < (found.tokens.nbytes + found.learned.nbytes) / 4
    assert not list(scratch.iterdir())  # nothing is left behind, whoever ends the process
    assert not found.tokens.flags.writeable
    assert batch["input_ids"].tolist() == [[tokenizer.convert_tokens_to_ids("a")] * 4096] * 2


def test_the_fingerprint_is_the_hash_of_the_arrays_bytes(mixture, tokenizer):
    found = load_examples(mixture, tokenizer, 100)
    fields = ("tokens", "learned", "offsets", "prompt_lengths", "source_ids", "task_ids")
    raw = b"".join(getattr(found, name).tobytes() for name in fields)
    assert found.fingerprint == hashlib.sha256(b"x\0y" + raw).hexdigest()
    again = load_examples(mixture, tokenizer, 100)
    assert again.fingerprint == found.fingerprint
    assert replace(again, prompt_lengths=again.prompt_lengths + 1).fingerprint != found.fingerprint
