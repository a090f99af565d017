"""Every method in a real training run: its rule fires on the expected steps and leaves, and resumes in its middle."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import tiny_bert
import tiny_llama
from safetensors.numpy import load_file
from tiny_training import FIELDS, adapted_decoder, decoder_loss, params_of

from mor_jax.adapters import METHODS, Leaves, NotMergeable, make_adapter
from mor_jax.cli.evaluate import evaluate_command
from mor_jax.cli.export import export_command
from mor_jax.cli.flags import UsageError
from mor_jax.cli.merge import merge_command
from mor_jax.cli.opening import open_run
from mor_jax.cli.options import EvalOptions, ExportOptions, MergeOptions
from mor_jax.export import export_hf
from mor_jax.injection import Adapted, resolve_sites
from mor_jax.merging import merge
from mor_jax.models import abstract_params
from mor_jax.optim import mean_penalty, plan_rules
from mor_jax.training import loop
from mor_jax.training.config import ConfigError, TrainConfig, config_to_mapping
from mor_jax.training.mesh import make_mesh
from mor_jax.training.run_folder import check_same_run
from mor_jax.training.sharding import param_specs
from mor_jax.training.step import init_state, make_step

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
    common = {"steps": STEPS, "batch_size": 4, "sequence_length": 24, "rank": 4, "mesh": "data=1"}
    common |= {"targets": ("q_proj", "o_proj"), "save_every": MIDDLE, "options": RULES.get(method, ({},))[0]}
    common |= {"weight_decay": 0.1, "learning_rate": 1e-2, "schedule": "constant"}
    held_out = (str(files / "held_out.jsonl"),) if method in RULES else ()  # events score on it
    common |= {"data": (str(files / "train.jsonl"),), "eval_data": held_out}
    return TrainConfig(model=str(files / "model"), method=method, output_dir=str(output_dir), **common | fields)


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


class Runs:
    """Each method's uninterrupted run, trained when a test first asks for it: any test may run alone."""

    def __init__(self, files, folders):
        self._files, self._folders, self._done = files, folders, {}

    def whole(self, method):
        """(folder, recorder, result)."""
        if method not in self._done:
            run = self._folders.mktemp(method) / "run"
            with pytest.MonkeyPatch.context() as patch:
                recorder = Recorder(patch)
                result = loop.train(config_of(self._files, run, method))
            self._done[method] = run, recorder, result
        return self._done[method]

    def __getitem__(self, method):
        """(folder, states before and after the events of every step)."""
        run, recorder, _ = self.whole(method)
        return run, recorder.states


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    return Runs(files, tmp_path_factory)


@pytest.mark.parametrize("method", METHODS)
def test_events_fire_on_exactly_their_steps_and_leaves(method, runs):
    """Between two events nothing but the optimiser writes; an event writes its leaves alone; each is in the log."""
    run, recorder, result = runs.whole(method)
    assert result["steps"] == STEPS
    assert ("eval_loss" in result) == (method in RULES)
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
    (whole, _), run = runs[method], tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    shutil.rmtree(run / "adapter")
    loop.train(config_of(files, run, method, resume=True))
    name = "adapter/adapter.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    timed = ("tokens_per_second", "peak_rss_bytes", "peak_device_bytes")
    kept = [[{k: v for k, v in line.items() if k not in timed} for line in lines_of(one)] for one in (run, whole)]
    assert kept[0] == kept[1]


def perplexity_of(model, files, **options):
    found = evaluate_command(EvalOptions(model=str(model), data=str(files / "held_out.jsonl"), limit=4, **options))
    return found["metrics"]["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_merge_or_refuse_and_export(method, files, tmp_path, runs):
    """The adapter file holds the last state; its merged model has the same held-out loss, or there is none."""
    run, states = runs[method]
    live, last = open_run(run), states[STEPS][1]
    jax.tree.map(
        np.testing.assert_array_equal,
        (live.leaves.params, live.leaves.state),
        tuple(last[name] for name in ("adapters", "adapter_state")),
    )
    loss = perplexity_of(run, files)
    exported = export_command(ExportOptions(run=str(run), output_dir=str(tmp_path / "adapter"), format="safetensors"))
    assert exported["format"] == "safetensors"
    name = "adapter.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    if not live.plan.sites[0].adapter.merges_exactly:
        with pytest.raises(NotMergeable, match="--gates|least_squares"):
            merge(live.params, live.leaves, live.plan)
        return
    merged = merge(live.params, live.leaves, live.plan)
    export_hf(merged, live.config, tmp_path / "merged", source_dir=live.directory)
    np.testing.assert_allclose(perplexity_of(tmp_path / "merged", files), loss, rtol=1e-5)


def test_dylora_draws_a_rank_a_step_and_moves_it_alone(runs):
    """Under AdamW with weight decay: between two steps only the drawn column of a and row of b differ, at all sites."""
    run, states = runs["dylora"]
    ranks = [line["rank"] for line in lines_of(run)]
    assert set(ranks) <= {1, 2, 3, 4}
    assert len(set(ranks)) > 1
    for step in range(2, STEPS + 1):
        before, after = states[step - 1][1]["adapters"], states[step][0]["adapters"]
        for path in before:
            moved_a = (before[path]["a"] != after[path]["a"]).any((0, 1))
            moved_b = (before[path]["b"] != after[path]["b"]).any((0, 2))
            assert moved_a.tolist() == moved_b.tolist() == [k + 1 == ranks[step - 1] for k in range(4)]


def test_dylora_is_evaluated_merged_and_exported_at_any_rank(files, tmp_path, runs):
    run, _ = runs["dylora"]
    cut = perplexity_of(run, files, rank=2)
    assert cut != perplexity_of(run, files)
    merged = merge_command(MergeOptions(run=str(run), output_dir=str(tmp_path / "merged"), rank=2, batches=1))
    assert merged["exact"]
    np.testing.assert_allclose(perplexity_of(tmp_path / "merged", files), cut, rtol=1e-5)
    folder = tmp_path / "adapter"
    export_command(ExportOptions(run=str(run), output_dir=str(folder), format="safetensors", rank=2))
    described = json.loads((folder / "adapter.json").read_text())["sites"]
    assert {(site["method"], site["options"]["rank"]) for site in described.values()} == {("lora", 2)}
    with pytest.raises(UsageError, match="between 1 and the trained rank 4"):
        perplexity_of(run, files, rank=5)
    with pytest.raises(UsageError, match="one rank only"):
        perplexity_of(runs["lora"][0], files, rank=2)


def test_halora_holds_its_noise_for_an_epoch(files, tmp_path):
    """Nothing learns and all batches are equal, so the loss is constant within an epoch of noise and nowhere else."""
    record = (files / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "same.jsonl").write_text("\n".join([record] * 8) + "\n")
    fields = {"data": (str(tmp_path / "same.jsonl"),), "packing": False, "learning_rate": 0.0, "steps": 7}
    loop.train(config_of(files, tmp_path / "run", "halora", eval_data=(), save_every=0, **fields))
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert len(set(losses[:3])) == len(set(losses[3:6])) == 1
    assert len({losses[0], losses[3], losses[6]}) == 3


def test_accumulation_does_not_change_a_rule(files, tmp_path, runs, monkeypatch):
    """Two micro-batches see the same feature norms together as one whole batch, so the same entries are pruned."""
    _, states_of_whole = runs["prilora"]
    recorder = Recorder(monkeypatch)
    loop.train(config_of(files, tmp_path / "run", "prilora", accumulate=2))
    for step in (3, 6):
        whole, split = (states[step][1] for states in (states_of_whole, recorder.states))
        for path, norms in whole["rule_state"]["0-prune"].items():
            np.testing.assert_allclose(
                split["rule_state"]["0-prune"][path]["feature_norm"], norms["feature_norm"], rtol=2e-3
            )
            zero, other = (state["adapters"][path]["a"] == 0 for state in (whole, split))
            assert (zero == other).mean() > 0.99  # two entries may be equal to rounding


def test_layers_apart_on_a_mesh(files, tmp_path, runs, monkeypatch):
    """--no-scan-layers on data x fsdp: the layers' own ranks and statistics, and the same loss as stacked ones."""
    run_of_stacked, states_of_stacked = runs["prilora"]
    recorder = Recorder(monkeypatch)
    loop.train(config_of(files, tmp_path / "run", "prilora", scan_layers=False, mesh="data=2,fsdp=2"))
    masks = {path: int(own["mask"].sum()) for path, own in recorder.states[STEPS][1]["adapter_state"].items()}
    assert {path.split("/")[0]: rank for path, rank in masks.items()} == {"layers_0": 2, "layers_1": 6}
    stacked = states_of_stacked[STEPS][1]["adapter_state"]
    assert all(own["mask"].sum(-1).tolist() == [2, 6] for own in stacked.values())
    assert [step for step, reports in recorder.reports.items() if reports] == [3, 6]
    first = [lines_of(run)[0]["loss"] for run in (tmp_path / "run", run_of_stacked)]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Fields of a run of a tiny BERT whose kernels, of 2^14 elements, fsdp shards layer by layer."""
    directory = tmp_path_factory.mktemp("encoder")
    config = dataclasses.replace(tiny_bert.CONFIG, hidden_size=128)
    looped = abstract_params(dataclasses.replace(config, scan_layers=False))
    kernel = looped["encoder"]["layer_0"]["attention"]["self"]["query"]["kernel"]
    assert "fsdp" in param_specs(kernel, make_mesh("data=2,fsdp=2"))
    model, data = tiny_bert.make_model(directory / "model", config), tiny_bert.write_pairs(directory / "p.jsonl", 16, 0)
    return {"model": model, "data": (data,), "eval_data": (), "targets": ("query",), "objective": "classification"}


@pytest.fixture(scope="module")
def stacked_loss(files, encoder, tmp_path_factory):
    """Of the first step with layers stacked, on one device: every method starts as the base."""
    run = tmp_path_factory.mktemp("stacked") / "run"
    loop.train(dataclasses.replace(config_of(files, run, "lora", steps=1, save_every=0), **encoder))
    return lines_of(run)[0]["loss"]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "mor"])
def test_an_encoder_with_layers_apart_on_a_mesh(method, files, encoder, stacked_loss, tmp_path):
    """--objective classification --no-scan-layers on data x fsdp: the same start, and every layer trained."""
    fields = {"scan_layers": False, "mesh": "data=2,fsdp=2", "save_every": 0} | encoder
    result = loop.train(dataclasses.replace(config_of(files, tmp_path / "run", method), **fields))
    lines = lines_of(tmp_path / "run")
    assert result["steps"] == len(lines) == STEPS
    np.testing.assert_allclose(lines[0]["loss"], stacked_loss, rtol=1e-5)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert all(np.isfinite(value).all() for value in trained.values())
    for layer in ("layer_0", "layer_1"):
        own = {name: value for name, value in trained.items() if f"/{layer}/" in name and not name.startswith("state:")}
        assert own
        assert all(value.any() for value in own.values())  # what was zero at the start has moved
    assert any("classifier" in name for name in trained)


def test_the_penalty_is_in_the_gradient_and_in_the_log(runs):
    """On a batch without a counted token nothing else moves the leaves."""
    base, ids = adapted_decoder("lora").base, jax.ShapeDtypeStruct((1, 8), np.int32)
    adapted = Adapted(base=base, plan=resolve_sites(base, make_adapter("adalora", rank=2), ("o_proj",), ids))
    rules = plan_rules(adapted.plan, 10)
    optimizer, params = rules.wrap(optax.sgd(1.0)), params_of()
    state, constants, _ = init_state(jax.random.key(0), adapted, params, optimizer, rules=rules)
    step = make_step(adapted, optimizer, loss=decoder_loss(adapted), constants=constants, rules=rules)
    batch = {name: np.zeros((2, 8), np.int32) for name in FIELDS}
    before = jax.tree.map(np.array, state.adapters)
    leaves = Leaves(before, jax.tree.map(np.array, state.adapter_state))
    penalty = jax.jit(jax.value_and_grad(lambda own: mean_penalty(adapted.plan, leaves._replace(params=own))))
    value, gradient = penalty(before)
    after, metrics = step(state, params, batch)
    np.testing.assert_allclose(metrics["penalty"], value, rtol=1e-6)
    jax.tree.map(lambda b, g, a: np.testing.assert_allclose(b - g, a, atol=1e-6), before, gradient, after.adapters)
    assert all(line["penalty"] > 0 for line in lines_of(runs["adalora"][0]) + lines_of(runs["halora"][0]))


def test_rules_cannot_be_forgotten():
    adapted = adapted_decoder("dylora", rank=2)
    with pytest.raises(ValueError, match="DyLoRA changes leaves while training: make rules = plan_rules"):
        make_step(adapted, optax.sgd(1.0), loss=decoder_loss(adapted))
    with pytest.raises(ValueError, match="rules=rules"):
        init_state(jax.random.key(0), adapted, {}, optax.sgd(1.0))


def test_steps_are_part_of_a_run_where_a_rule_depends_on_them(files, tmp_path):
    """A constant schedule allows more steps on resume, unless the rule was planned for fewer."""
    for method, steps_matter in (("prilora", False), ("alora", True)):
        config, longer = (config_of(files, tmp_path, method, steps=steps) for steps in (STEPS, STEPS + 4))
        saved = {"config": config_to_mapping(config), "custom_optimizer": False}
        if not steps_matter:
            check_same_run(longer, saved, False)
        else:
            with pytest.raises(ConfigError, match="steps=12"):
                check_same_run(longer, saved, False)
