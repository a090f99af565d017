"""Runs of `mor train` with every method on a tiny decoder or encoder, and a record of what happened in them."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import tiny_bert
import tiny_llama
from tiny_runs import VARIES

from mor_jax.cli.main import main
from mor_jax.injection import get_path
from mor_jax.training import loop
from mor_jax.training.build import base_specs
from mor_jax.training.checkpoint import fingerprint
from mor_jax.training.config import TrainConfig, save_config
from mor_jax.training.mesh import make_mesh

STEPS, MIDDLE = 8, 4
MESH = "data=2,fsdp=2"
# Kernels of 2^14 elements, so that fsdp shards those of a single layer too.
DECODER = dataclasses.replace(tiny_llama.CONFIG, hidden_size=128, intermediate_size=160, head_dim=32)
ENCODER = dataclasses.replace(tiny_bert.CONFIG, hidden_size=128)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A method's options in these runs, and {event: {step: leaves that it writes then}}.

    `count` names the figure of an event's report that is 0 where it found nothing to do; where it is not, the event
    writes some of the leaves.
    """

    options: dict = dataclasses.field(default_factory=dict)
    events: dict = dataclasses.field(default_factory=dict)
    count: str = ""

    @property
    def steps(self):
        """{event: steps}."""
        return {event: tuple(leaves) for event, leaves in self.events.items()}


MOVED = {"gamma", "a", "b"}
FOLDED = {"m", "accumulated", "group_type"}
RULES = {
    "prilora": Rule({"prune_interval": 3}, {"prune": {3: {"a"}, 6: {"a"}}}),
    "adalora": Rule(
        {"interval": 2, "start_fraction": 0.125, "final_fraction": 0.25},
        {"cut": {2: {"e"}, 4: {"e"}, 6: {"e", "mask"}}},
    ),
    "alora": Rule({"moved": 2}, {"reallocate": dict.fromkeys((3, 4, 5, 6, 7), MOVED)}, "pruned"),
    # on odd steps the factors are remembered, in the rule's own state
    "beamlora": Rule(
        {"interval": 2, "first_share": 0.5},
        {"expand": {1: set(), 2: MOVED, 3: set(), 4: MOVED, 5: set(), 6: MOVED}},
        "moved",
    ),
    "mora": Rule({"reset_every": 3}, {"fold": {3: FOLDED, 6: FOLDED}}),
    "halora": Rule({"noise_steps": 3, "sigma": 0.1}),
}


def rule_of(method):
    return RULES.get(method, Rule())


def make_files(directory):
    """The two models with their data, {name: path}."""
    for config, layer in (
        (DECODER, ("layers_0", "self_attn", "q_proj")),
        (ENCODER, ("encoder", "layer_0", "attention", "self", "query")),
    ):
        specs = base_specs(dataclasses.replace(config, scan_layers=False), make_mesh(MESH))
        assert "fsdp" in get_path(specs, (*layer, "kernel"))
    files = {"decoder": tiny_llama.make_model(directory / "decoder", DECODER)}
    files["encoder"] = tiny_bert.make_model(directory / "encoder", ENCODER)
    for name, count in (("train", 40), ("held_out", 8)):
        files[name] = tiny_llama.write_records(directory / f"{name}.jsonl", count)
    return files | {"pairs": tiny_bert.write_pairs(directory / "pairs.jsonl", 16, 0)}


def config_of(files, output_dir, method, **fields):
    """On the decoder, on one device."""
    common = {"steps": STEPS, "batch_size": 4, "sequence_length": 24, "rank": 4, "mesh": "data=1"}
    common |= {"targets": ("q_proj", "o_proj"), "save_every": MIDDLE, "options": rule_of(method).options}
    common |= {"weight_decay": 0.1, "learning_rate": 1e-2, "schedule": "constant"}
    held_out = (files["held_out"],) if method in RULES else ()  # events score on it
    common |= {"data": (files["train"],), "eval_data": held_out}
    common |= {"model": files["decoder"], "output_dir": str(output_dir)}
    return TrainConfig(method=method, **common | fields)


def on_encoder(files):
    """Fields of a run on the encoder; events score on the batch of their step."""
    return {
        "model": files["encoder"],
        "data": (files["pairs"],),
        "eval_data": (),
        "targets": ("query",),
        "objective": "classification",
    }


def mor(*words, code=0):
    """(what `mor WORDS --json` prints, as JSON; its standard error); the exit code must be `code`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main([*map(str, words), "--json"])
    assert found == code, err.getvalue()
    return (json.loads(out.getvalue()) if code == 0 else out.getvalue()), err.getvalue()


class Recorder:
    """The states before and after the events of every step, the bases seen, and how often anything was compiled."""

    def __init__(self, monkeypatch):
        self.states, self.reports, self.bases, self.events = {}, {}, set(), None
        make = loop.make_events

        def recorded(*args, **options):
            self.events = make(*args, **options)
            return self

        monkeypatch.setattr(loop, "make_events", recorded)

    def compile(self, *arguments):
        self.events.compile(*arguments)

    def __call__(self, step, state, params, batch):
        before = self._copy(state)
        state, reports = self.events(step, state, params, batch)
        self.states[step], self.reports[step] = (before, self._copy(state)), reports
        self.bases.add(fingerprint(params))
        return state, reports

    def _copy(self, state):
        return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state._asdict())

    @property
    def fired(self):
        """{event: steps}."""
        found = {}
        for step, reports in self.reports.items():
            for event in reports:
                found.setdefault(event, []).append(step)
        return {event: tuple(steps) for event, steps in found.items()}


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed_lines(run):
    """The lines without what a clock or the machine decides."""
    return [{name: value for name, value in line.items() if name not in VARIES} for line in lines_of(run)]


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished run: its folder, what was recorded, what `mor train` printed."""

    folder: Path
    recorder: Recorder
    result: dict

    @property
    def states(self):
        return self.recorder.states


def train(config):
    """`mor train` with the method and the folder on the command line and all else in a file."""
    folder = Path(config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.yaml"
    save_config(dataclasses.replace(config, method="lora", options={}, output_dir="nowhere"), file)
    words = ["train", file, "--method", config.method, "--output-dir", folder]
    if config.options:
        words += ["--options", ",".join(f"{name}={json.dumps(value)}" for name, value in config.options.items())]
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        result, _ = mor(*words)
    return Done(folder, recorder, result)


class Runs:
    """Each method's uninterrupted run, trained when a test first asks for it: any test may run alone."""

    def __init__(self, files, folders):
        self._files, self._folders, self._done = files, folders, {}

    def __getitem__(self, method):
        """On the decoder with stacked layers, on one device."""
        if method not in self._done:
            self._done[method] = train(config_of(self._files, self._folders.mktemp(method) / "run", method))
        return self._done[method]
