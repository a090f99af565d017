"""Properties of packing plans for any lengths, weights and seeds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from byte_tokenizers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.data import MODES, DataSource, PackingPlan, load_examples, make_plan, pack

ROW = 24


def plan_of(lengths, source_ids, weights, **options):
    return PackingPlan(np.array(lengths, np.int64), np.array(source_ids, np.int64), tuple(weights), ROW, **options)


WHOLE = st.integers(1, 3)


@st.composite
def plans(draw, weights=WHOLE):
    lengths = draw(st.lists(st.integers(1, ROW), min_size=1, max_size=40))
    weights = draw(st.lists(weights, min_size=1, max_size=3))
    sources = draw(st.lists(st.integers(0, len(weights) - 1), min_size=len(lengths), max_size=len(lengths)))
    seed, mode = draw(st.integers(0, 3)), draw(st.sampled_from(MODES))
    return plan_of(lengths, sources, map(float, weights), seed=seed, mode=mode)


def counted(plan, *epochs):
    return Counter(int(e) for epoch in epochs for e in plan.epoch_rows(epoch).examples)


@given(plans(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_has_every_example_by_its_weight_and_no_row_is_too_long(plan, epoch):
    rows = plan.epoch_rows(epoch)
    assert counted(plan, epoch) == {e: plan.weights[source] for e, source in enumerate(plan.source_ids)}
    sizes = [plan.lengths[rows.row(number)].sum() for number in range(rows.num_rows)]
    assert min(sizes) > 0
    assert max(sizes) <= ROW
    assert sum(sizes) == sum(plan.lengths * np.array(plan.weights)[plan.source_ids])
    assert plan.has_equal_epochs
    assert rows.num_rows == plan.epoch_rows(epoch + 1).num_rows
    assert plan.efficiency(epoch) == pytest.approx(sum(sizes) / (ROW * rows.num_rows))
    if plan.mode == "padded":
        assert (np.diff(rows.offsets) == 1).all()


@given(plans(weights=st.sampled_from([0.25, 0.5, 1.25, 1.5, 2.0])))
@settings(max_examples=40, deadline=None)
def test_fractional_weights_come_out_even_over_their_period(plan):
    wanted = {e: 4 * plan.weights[source] for e, source in enumerate(plan.source_ids)}
    assert counted(plan, 0, 1, 2, 3) == wanted
    for epoch in range(4):
        found = counted(plan, epoch)
        for source, weight in enumerate(plan.weights):
            ids = np.flatnonzero(plan.source_ids == source)
            assert all(int(weight) <= found[int(e)] <= int(weight) + 1 for e in ids)
            assert abs(sum(found[int(e)] for e in ids) - weight * len(ids)) < 1


@given(plans())
@settings(max_examples=25, deadline=None)
def test_a_plan_is_a_function_of_its_fields(plan):
    same = replace(plan)
    for epoch in (3, 0):
        for ours, theirs in zip(plan.epoch_rows(epoch), same.epoch_rows(epoch), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert plan.hash == same.hash
    for change in (
        {"seed": 99},
        {"row_length": ROW + 1},
        {"fingerprint": "x"},
        {"lengths": plan.lengths[::-1] % 7 + 1},
    ):
        changed = replace(plan, **change)
        assert changed.hash != plan.hash or np.array_equal(changed.lengths, plan.lengths)


@given(st.lists(st.integers(1, ROW), max_size=60))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_plain_definition(lengths):
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        space = [ROW - sum(lengths[i] for i in row) for row in rows]
        fits = [number for number, free in enumerate(space) if free >= length]
        if not fits:
            rows.append([index])
        else:  # any of the fullest rows; which one changes no row's size, so sizes are compared
            rows[min(fits, key=lambda number: space[number])].append(index)
    found = pack(lengths, ROW)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))
    sums = [sorted(sum(lengths[i] for i in row) for row in each) for each in (found, rows)]
    assert sums[0] == sums[1]


def test_epochs_and_seeds_differ():
    lengths = np.random.default_rng(0).integers(1, ROW, 200)
    plan = plan_of(lengths, np.zeros(200), [1.0])

    def neighbours(rows):
        return {tuple(sorted(rows.row(number))) for number in range(rows.num_rows)}

    first, second, other = plan.epoch_rows(0), plan.epoch_rows(1), replace(plan, seed=1).epoch_rows(0)
    assert neighbours(first) != neighbours(second)
    assert neighbours(first) != neighbours(other)


def test_long_tailed_lengths_fill_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(3, 0.9, 3000), 2, 256).astype(int)
    plan = PackingPlan(lengths, np.zeros(3000, int), (1.0,), 256)
    assert plan.efficiency() >= 0.95
    assert replace(plan, mode="padded").efficiency() < 0.2


def test_instruction_data_fill_rows(smollm2):
    path = SHARED / "data/instruct/alpaca_en_demo.json"
    if not path.exists():
        pytest.skip(f"no instruction data where the real models are not on this machine: {path}")
    examples = load_examples([DataSource(str(path))], smollm2, 1024)
    assert len(examples) > 900
    assert make_plan(examples, 1024).efficiency() >= 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sorted"}, "mode must be one of best_fit"),
        ({"lengths": np.zeros(0, int)}, "is empty"),
        ({"lengths": np.array([ROW + 1])}, r"must lie in 1..24 \(the row length\), got 25..25"),
        ({"lengths": np.array([0])}, "must lie in 1..24"),
        ({"weights": (0.0,)}, "must be positive"),
    ],
)
def test_impossible_plans_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan_of([1], [0], [1.0]), **change)
