"""Every method in a real training run: its rule fires on the expected steps and leaves, and resumes in its middle."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import tiny_llama

from mor_jax.adapters import METHODS
from mor_jax.training import loop
from mor_jax.training.config import TrainConfig

STEPS, MIDDLE = 8, 4
# Method -> (its options, {event: steps}, leaves that the events write). All others have no event.
RULES = {
    "prilora": ({"prune_interval": 3}, {"prune": (3, 6)}, {"a"}),
    "adalora": (
        {"interval": 2, "start_fraction": 0.125, "final_fraction": 0.25},
        {"cut": (2, 4, 6)},
        {"e", "mask"},
    ),
    "alora": ({"moved": 2}, {"reallocate": (3, 4, 5, 6, 7)}, {"gamma", "a", "b"}),
    "beamlora": ({"interval": 2, "first_share": 0.5}, {"expand": (1, 2, 3, 4, 5, 6)}, {"gamma", "a", "b"}),
    "mora": ({"reset_every": 3}, {"fold": (3, 6)}, {"m", "accumulated", "group_type"}),
    "halora": ({"noise_steps": 3, "sigma": 0.1, "mergeable": True}, {}, set()),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    tiny_llama.make_model(directory / "model")
    for name, count in (("train", 40), ("held_out", 8)):
        tiny_llama.write_records(directory / f"{name}.jsonl", count)
    return directory


def config_of(files, output_dir, method, **fields):
    common = {"steps": STEPS, "batch_size": 4, "accumulate": 2, "sequence_length": 24, "rank": 4, "mesh": "data=1"}
    common |= {"targets": ("q_proj", "o_proj"), "save_every": MIDDLE, "options": RULES.get(method, ({},))[0]}
    common |= {"weight_decay": 0.1, "learning_rate": 1e-2, "schedule": "constant"}
    data = {"data": (str(files / "train.jsonl"),), "eval_data": (str(files / "held_out.jsonl"),)}
    return TrainConfig(model=str(files / "model"), method=method, output_dir=str(output_dir), **data, **common | fields)


class Recorder:
    """The states before and after the events of every step, and how often anything was compiled."""

    def __init__(self, monkeypatch):
        self.states, self.reports, self.events = {}, {}, None
        make = loop.make_events

        def recorded(*args, **options):
            self.events = make(*args, **options)
            return self

        monkeypatch.setattr(loop, "make_events", recorded)

    def __call__(self, step, state, params, batch):
        before = self._copy(state)
        state, reports = self.events(step, state, params, batch)
        self.states[step], self.reports[step] = (before, self._copy(state)), reports
        return state, reports

    def _copy(self, state):
        return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state._asdict())


def changed_leaves(before, after):
    names = set()
    for tree in ("adapters", "adapter_state"):
        pairs = zip(jax.tree.leaves_with_path(before[tree]), jax.tree.leaves(after[tree]), strict=True)
        names |= {path[-1].key for (path, one), other in pairs if (one != other).any()}
    return names


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs():
    """What each method's uninterrupted run left, for the tests after it."""
    return {}


@pytest.mark.parametrize("method", METHODS)
def test_events_fire_on_exactly_their_steps_and_leaves(method, files, tmp_path_factory, runs, monkeypatch):
    """Between two events nothing but the optimiser writes; an event writes its leaves alone; each is in the log."""
    recorder, run = Recorder(monkeypatch), tmp_path_factory.mktemp(method) / "run"
    result = loop.train(config_of(files, run, method))
    runs[method] = run
    assert result["steps"] == STEPS
    assert np.isfinite(result["eval_loss"])
    assert result["padded_parameters"] >= result["trainable_parameters"] > 0
    _, expected, leaves = RULES.get(method, ({}, {}, set()))
    lines, fired, written = lines_of(run), {}, set()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for step, (before, after) in recorder.states.items():
        names = changed_leaves(before, after)
        assert set(lines[step - 1].get("events", {})) == set(recorder.reports[step])
        for event in recorder.reports[step]:
            fired.setdefault(event, []).append(step)
        if not recorder.reports[step]:
            jax.tree.map(np.testing.assert_array_equal, before, after)
        assert names <= leaves
        written |= names
    assert {event: tuple(steps) for event, steps in fired.items()} == expected
    assert written == leaves
    assert recorder.events.cache_size() == len(expected)


@pytest.mark.parametrize("method", METHODS)
def test_resume_in_the_middle_of_the_rule_is_bitwise(method, files, tmp_path, runs):
    """From the checkpoint between two events: the same adapter, bit by bit, and the same log."""
    whole, run = runs[method], tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    shutil.rmtree(run / "adapter")
    loop.train(config_of(files, run, method, resume=True))
    name = "adapter/adapter.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    timed = ("tokens_per_second", "peak_memory_bytes")
    kept = [[{k: v for k, v in line.items() if k not in timed} for line in lines_of(one)] for one in (run, whole)]
    assert kept[0] == kept[1]
