"""Rows, batches, the iterator's state, and that resuming, batch size and number of hosts change no row."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import grain
import numpy as np
import pytest

from mor_jax.data import (
    BATCH_FIELDS,
    DataError,
    DataSource,
    build_row,
    load_examples,
    make_iterator,
    make_plan,
    single_pass,
)

ROW = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    random = np.random.default_rng(0)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in random.integers(1, 15, 23)))
    pairs = ({"prompt": "p" * n, "completion": "c" * (n % 5 + 1)} for n in random.integers(1, 9, 17))
    (folder / "b.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(folder / "a.jsonl"), str(folder / "b.jsonl")


@pytest.fixture(scope="module")
def examples(files, tokenizer):
    return load_examples([DataSource(files[0], "a"), DataSource(files[1], "b", 1.5)], tokenizer, ROW)


@pytest.fixture(scope="module")
def plan(examples):
    return make_plan(examples, ROW, seed=3)


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_row_by_hand(write_jsonl, tokenizer):
    path = write_jsonl([{"prompt": "xy", "completion": "z"}, {"text": "ab"}])
    examples = load_examples([DataSource(path)], tokenizer, 10)
    examples = replace(examples, task_ids=np.array([4, 7], np.int32))
    x, y, z, a, b = tokenizer.convert_tokens_to_ids(list("xyzab"))
    end = tokenizer.eos_token_id
    row = build_row(examples, np.array([1, 0]), 9)
    wanted = {
        "input_ids": [a, b, end, x, y, z, end, 0, 0],
        "targets": [b, end, 0, y, z, end, 0, 0, 0],
        "loss_mask": [1, 1, 0, 0, 1, 1, 0, 0, 0],
        "segment_ids": [1, 1, 1, 2, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0, 0],
        "task_ids": [7, 7, 7, 4, 4, 4, 4, 0, 0],
        "prompt_mask": [0, 0, 0, 1, 1, 0, 0, 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == wanted
    assert {values.dtype for values in row.values()} == {np.dtype(np.int32)}
    assert tuple(row) == BATCH_FIELDS


def test_every_row_is_its_examples(examples, plan):
    """Segments are cut out of the batches and found among the examples again, each as often as its weight says."""
    found = {}
    for batch in single_pass(examples, plan, 4):
        for ids, segments, positions, tasks in zip(
            *(batch[name] for name in ("input_ids", "segment_ids", "positions", "task_ids")), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                where = np.flatnonzero(segments == segment)
                assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
                assert positions[where].tolist() == list(range(len(where)))
                (task,) = set(tasks[where].tolist())
                found.setdefault((task, tuple(ids[where])), []).append(segment)
    wanted = {}
    for number in plan.epoch_examples(0):
        first, last = examples.offsets[number : number + 2]
        wanted.setdefault((int(examples.task_ids[number]), tuple(examples.tokens[first:last])), []).append(0)
    assert {key: len(value) for key, value in found.items()} == {key: len(value) for key, value in wanted.items()}


def test_a_single_pass_fills_its_last_batch_with_empty_rows(examples, plan):
    batches = list(single_pass(examples, plan, 5))
    rows = plan.epoch_rows(0).num_rows
    assert rows % 5
    assert {batch["input_ids"].shape for batch in batches} == {(5, ROW)}
    used = np.concatenate([batch["segment_ids"].any(axis=1) for batch in batches])
    assert used.tolist() == [number < rows for number in range(5 * len(batches))]
    assert not batches[-1]["loss_mask"][rows % 5 :].any()


def rows_of(iterator, number):
    rows = []
    while len(rows) < number:
        batch = next(iterator)
        rows += [{name: values[i] for name, values in batch.items()} for i in range(len(batch["input_ids"]))]
    return rows[:number]


def test_batch_size_and_hosts_change_no_row(examples, plan):
    wanted = rows_of(make_iterator(examples, plan, 1), 60)
    assert len(wanted) > 2 * plan.epoch_rows(0).num_rows  # over the borders of epochs
    assert all(map(same, wanted, rows_of(make_iterator(examples, plan, 6), 60)))
    hosts = [make_iterator(examples, plan, 6, held=[2 * i, 2 * i + 1]) for i in range(3)]
    dealt = [row for _ in range(10) for host in hosts for row in rows_of(host, 2)]  # each host's two of every six
    assert all(map(same, wanted, dealt))


def test_epochs_are_whole_and_reshuffled(examples, files, tokenizer):
    whole = load_examples([DataSource(files[0])], tokenizer, ROW)
    plan = make_plan(whole, ROW, seed=3)
    per_epoch = plan.epoch_rows(0).num_rows
    iterator = make_iterator(whole, plan, 1)
    epochs = []
    for _ in range(3):
        rows = rows_of(iterator, per_epoch)
        epochs.append([tuple(row["input_ids"]) for row in rows])
        assert sum((row["segment_ids"] > 0).sum() for row in rows) == len(whole.tokens)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("consumed", [0, 1, 5, 13])
def test_state_gives_the_same_next_batches_under_another_batch_size(examples, plan, consumed):
    iterator = make_iterator(examples, plan, 4)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["row"] == 4 * consumed
    wanted = rows_of(iterator, 24)
    for batch_size in (4, 3):
        again = make_iterator(examples, plan, batch_size)
        next(again)
        again.set_state(state)
        assert all(map(same, rows_of(again, 24), wanted))


def test_state_of_other_data_is_refused(examples, plan, files, tokenizer):
    state = make_iterator(examples, plan, 4).get_state()
    other = load_examples([DataSource(files[0], "a"), DataSource(files[1], "b", 2.0)], tokenizer, ROW)
    for iterator in (
        make_iterator(other, make_plan(other, ROW, seed=3), 4),
        make_iterator(examples, make_plan(examples, ROW, seed=4), 4),
        make_iterator(examples, make_plan(examples, ROW + 1, seed=3), 4),
        make_iterator(examples, plan, 4, seed=1),
    ):
        with pytest.raises(DataError, match="belongs to another packing plan"):
            iterator.set_state(state)


NEW_PROCESS = """
import json, sys
sys.path[:0] = [sys.argv[1]]
from byte_tokenizers import byte_tokenizer
from mor_jax.data import DataSource, load_examples, make_iterator, make_plan
files, state = json.loads(sys.argv[2])
examples = load_examples([DataSource(files[0], "a"), DataSource(files[1], "b", 1.5)], byte_tokenizer(), 16)
iterator = make_iterator(examples, make_plan(examples, 16, seed=3), 4)
iterator.set_state(state)
print(json.dumps([{name: values.tolist() for name, values in next(iterator).items()} for _ in range(3)]))
"""


def test_state_in_a_new_process(examples, plan, files, request):
    iterator = make_iterator(examples, plan, 4)
    next(iterator), next(iterator)
    sent = json.dumps([files, iterator.get_state()])
    command = [sys.executable, "-c", NEW_PROCESS, str(request.path.parent), sent]
    result = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert result.returncode == 0, result.stderr
    for theirs, ours in zip(json.loads(result.stdout.splitlines()[-1]), islice(iterator, 3), strict=True):
        assert theirs == {name: values.tolist() for name, values in ours.items()}


def test_grain_saves_and_restores_it_through_orbax(examples, plan, tmp_path):
    import orbax.checkpoint as ocp

    iterator = make_iterator(examples, plan, 4)
    assert isinstance(iterator, grain.DatasetIterator)
    next(iterator), next(iterator)
    with ocp.CheckpointManager(tmp_path.absolute()) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        wanted = [next(iterator) for _ in range(3)]
        again = make_iterator(examples, plan, 4)
        manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert all(map(same, islice(again, 3), wanted))
    again.close()
    with pytest.raises(ValueError, match="closed"):
        next(again)


def test_wrong_calls_are_errors(examples, plan, files, tokenizer):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_iterator(examples, plan, 0)
    with pytest.raises(ValueError, match="held must lie in 0..3"):
        make_iterator(examples, plan, 4, held=[3, 4])
    other = load_examples([DataSource(files[0])], tokenizer, ROW)
    with pytest.raises(ValueError, match="made for other examples"):
        single_pass(other, plan, 2)
