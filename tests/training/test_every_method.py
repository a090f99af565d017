"""Every method from `mor train` to its export, by the commands: its rule, its resume, its merge or its refusal.

On the decoder with stacked layers on one device, and from the middle on a data x fsdp mesh; on the decoder with layers
apart and on the encoder with a classifier on one device and on that mesh, which must agree.
"""

import json
import math
import shutil

import jax
import method_runs
import numpy as np
import pytest
from method_runs import MESH, MIDDLE, RULES, STEPS, config_of, lines_of, mor, on_encoder, rule_of, untimed_lines
from safetensors.numpy import load_file

from mor_jax.adapters import METHODS, NotMergeable
from mor_jax.cli.opening import open_run
from mor_jax.merging import merge

pytestmark = pytest.mark.usefixtures("quick_compilation")
each_method = pytest.mark.parametrize("method", METHODS)
PENALTIES = {"adalora", "halora"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return method_runs.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    return method_runs.Runs(files, tmp_path_factory)


def differences(before, after):
    """{leaf name: whether any entry of it differs} over adapters and their state."""
    found = {}
    for tree in ("adapters", "adapter_state"):
        pairs = zip(jax.tree.leaves_with_path(before[tree]), jax.tree.leaves(after[tree]), strict=True)
        for path, one, other in ((path, one, other) for (path, one), other in pairs):
            found[path[-1].key] = found.get(path[-1].key, False) or bool((one != other).any())
    return {name for name, differs in found.items() if differs}


def check_training(method, done, stacked):
    """All steps done, the base untouched, every layer of every trained leaf moved, each event on its steps."""
    lines, states = lines_of(done.folder), done.states
    assert done.result["steps"] == STEPS
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) == list(states)
    assert all(math.isfinite(line["loss"]) for line in lines)
    described = json.loads((done.folder / "adapter" / "adapter.json").read_text())
    assert done.recorder.bases == {described["base_fingerprint"]}
    first, last = states[1][0], states[STEPS][1]
    pairs = zip(jax.tree.leaves_with_path(first["adapters"]), jax.tree.leaves(last["adapters"]), strict=True)
    for path, one, other in ((path, one, other) for (path, one), other in pairs):
        assert np.isfinite(other).all()
        layers = len(one) if stacked and "layer" in path[0].key else 1
        assert (one != other).reshape(layers, -1).any(1).all(), path
    assert done.recorder.fired == rule_of(method).steps
    assert [set(line.get("events", {})) for line in lines] == [set(done.recorder.reports[step]) for step in states]


def check_events(done, rule):
    """All leaves that the events of a run wrote, each on its own steps; nothing else wrote any state."""
    written = set()
    for step, (before, after) in done.states.items():
        reports, names = done.recorder.reports[step], differences(before, after)
        allowed = set().union(*(leaves.get(step, set()) for leaves in rule.events.values()))
        if not reports:
            jax.tree.map(np.testing.assert_array_equal, before, after)
        if rule.count and reports:
            assert bool(names) == any(report[rule.count] > 0 for report in reports.values())
            assert names <= allowed
        else:
            assert names == allowed
        if step > 1:
            kept = done.states[step - 1][1]["adapter_state"], before["adapter_state"]
            jax.tree.map(np.testing.assert_array_equal, *kept)
        written |= names
    return written


def check_same_course(one, other):
    """Logs of the same steps on two meshes: the first to rounding, which the optimiser enlarges, and every event."""
    first, second = ([line["loss"] for line in lines] for lines in (one, other))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5)
    np.testing.assert_allclose(first[:MIDDLE], second[:MIDDLE], rtol=2e-2)
    assert [set(line.get("events", {})) for line in one] == [set(line.get("events", {})) for line in other]


def trained_on_both(method, files, folder, stacked, **fields):
    """The run on the mesh, after a check that one device takes the same course."""
    runs = [
        method_runs.train(config_of(files, folder / mesh, method, mesh=mesh, save_every=0, **fields))
        for mesh in ("data=1", MESH)
    ]
    for done in runs:
        check_training(method, done, stacked)
    check_same_course(*(lines_of(done.folder) for done in runs))
    return runs[1]


def resumed(done, folder, *words):
    """The run gone on with from its middle by `mor train --resume`."""
    shutil.copytree(done.folder, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    shutil.rmtree(folder / "adapter")
    result, _ = mor("train", folder / "config.yaml", "--resume", *words)
    assert result["steps"] == STEPS
    return folder


@each_method
def test_training_follows_the_rule(method, runs):
    """Between two events the optimiser alone writes; an event writes its own leaves and no others; each is logged."""
    done, rule = runs[method], rule_of(method)
    check_training(method, done, stacked=True)
    result, lines = done.result, lines_of(done.folder)
    assert ("eval_loss" in result) == (method in RULES)
    assert result["padded_parameters"] >= result["trainable_parameters"] > 0
    assert all(("penalty" in line) == (method in PENALTIES) and line.get("penalty", 1) > 0 for line in lines)
    assert all(("rank" in line) == (method == "dylora") for line in lines)
    assert check_events(done, rule) == set().union(*(set().union(*leaves.values()) for leaves in rule.events.values()))
    assert done.recorder.events.cache_size() == len(rule.events)


@each_method
def test_resume_in_the_middle_of_the_rule_is_bitwise(method, runs, tmp_path):
    """From the checkpoint between two events: the same adapter, bit by bit, and the same log."""
    done, folder = runs[method], resumed(runs[method], tmp_path / "run")
    name = "adapter/adapter.safetensors"
    assert (folder / name).read_bytes() == (done.folder / name).read_bytes()
    assert untimed_lines(folder) == untimed_lines(done.folder)


@each_method
def test_resume_on_a_mesh(method, runs, tmp_path):
    """Stacked layers on data x fsdp: the first step to rounding, which the optimiser may enlarge, and every event."""
    folder = resumed(runs[method], tmp_path / "run", "--mesh", MESH)
    check_same_course(lines_of(runs[method].folder)[MIDDLE:], lines_of(folder)[MIDDLE:])


def test_resume_scores_on_the_same_held_out_batch(files, runs, tmp_path):
    """ALoRA's rounds depend on it, so other held-out data are refused; the same elsewhere are not."""
    folder = shutil.copytree(runs["alora"].folder, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    _, error = mor("train", folder / "config.yaml", "--resume", "--eval-data", files["train"], code=2)
    assert "eval_data=" in error
    assert "which the events of a method score on" in error
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    moved = shutil.copy(files["held_out"], tmp_path / "moved.jsonl")
    result, _ = mor("train", folder / "config.yaml", "--resume", "--eval-data", moved)
    assert result["steps"] == STEPS


@each_method
def test_evaluate_merge_or_refuse_and_export(method, files, runs, tmp_path):
    """The adapter file holds the last state; its merged model has the same logits, or there is none."""
    done = runs[method]
    live, last = open_run(done.folder), done.states[STEPS][1]
    own = live.leaves.params, live.leaves.state
    jax.tree.map(np.testing.assert_array_equal, own, (last["adapters"], last["adapter_state"]))
    metrics = mor("eval", done.folder, "--data", files["held_out"])[0]["metrics"]
    assert metrics["examples"] == 8
    if method in RULES:
        np.testing.assert_allclose(metrics["loss"], done.result["eval_loss"], rtol=1e-5)
    folder = tmp_path / "adapter"
    mor("export", done.folder, "--output-dir", folder, "--format", "safetensors")
    for name in ("adapter.safetensors", "adapter.json"):
        assert (folder / name).read_bytes() == (done.folder / "adapter" / name).read_bytes()
    check_merge(live, done.folder, tmp_path / "merged")
    found = mor("eval", tmp_path / "merged", "--data", files["held_out"])[0]["metrics"]
    if live.plan.sites[0].adapter.merges_exactly:
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    assert set(found) == set(metrics)


def check_merge(live, run, output):
    """`mor merge`: exact, or refused until it is asked for or approximated; a refusal names what to do instead."""
    adapter, words = live.plan.sites[0].adapter, ("merge", run, "--output-dir", output, "--batches", "1")
    if adapter.merge_condition:
        _, error = mor(*words, code=2)
        assert "--mergeable" in error
        assert error.count("\n") == 1
        assert not output.exists()
        words += ("--mergeable",)
    if not adapter.merges_exactly:
        with pytest.raises(NotMergeable, match="--gates mean|least_squares"):
            merge(live.params, live.leaves, live.plan)
        words += ("--gates", "mean")
    merged, _ = mor(*words)
    assert merged["exact"] == adapter.merges_exactly
    if not adapter.merges_exactly:
        assert math.isfinite(merged["kl"])
        return
    errors = json.loads((output / "fidelity.json").read_text())["site_errors"]
    assert max(max(each) for each in errors.values()) < 1e-4  # of the change at each layer
    assert merged["max_logit_difference"] < 5e-4  # of logits that reach to about 10


@each_method
def test_layers_apart(method, files, runs, tmp_path):
    """--no-scan-layers with another optimiser: the same start as stacked layers, every layer trained."""
    options = {"form": "middle"} if method == "reslora" else rule_of(method).options
    fields = {"scan_layers": False, "targets": ("o_proj",), "eval_data": (), "options": options}
    fields |= {"optimizer": "lion", "learning_rate": 1e-3}
    done = trained_on_both(method, files, tmp_path, False, **fields)
    ours, stacked = (lines_of(one.folder)[0]["loss"] for one in (done, runs[method]))
    if method != "halora":  # whose noise is drawn by the names of the sites
        np.testing.assert_allclose(ours, stacked, rtol=1e-5)
    metrics = mor("eval", done.folder, "--data", files["held_out"])[0]["metrics"]
    assert metrics["examples"] == 8
    assert math.isfinite(metrics["loss"])
    if method == "prilora":  # its ranks grow with depth, in whichever layout
        trained = load_file(done.folder / "adapter" / "adapter.safetensors")
        masks = {name.split("/")[0]: int(mask.sum()) for name, mask in trained.items() if name.endswith("/mask")}
        assert masks == {"state:layers_0": 2, "state:layers_1": 6}
        whole = load_file(runs[method].folder / "adapter" / "adapter.safetensors")
        assert all(mask.sum(-1).tolist() == [2, 6] for name, mask in whole.items() if name.endswith("/mask"))


@each_method
def test_an_encoder(method, files, tmp_path):
    """--objective classification: a head trained with the adapter, judged and exported with it."""
    options = {"form": "input"} if method == "reslora" else rule_of(method).options
    done = trained_on_both(method, files, tmp_path, True, **on_encoder(files) | {"options": options})
    assert any("classifier" in path for path in done.states[STEPS][1]["adapters"])
    words = ("--data", files["pairs"], "--task", "classification")
    metrics = mor("eval", done.folder, *words)[0]["metrics"]
    assert {"accuracy", "macro_f1", "loss"} <= set(metrics)
    mor("export", done.folder, "--output-dir", tmp_path / "adapter", "--format", "safetensors")
    name = "adapter.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (done.folder / "adapter" / name).read_bytes()


def test_dylora_draws_a_rank_a_step_and_moves_it_alone(runs):
    """Under AdamW with weight decay: between two steps only the drawn column of a and row of b differ, at all sites."""
    done = runs["dylora"]
    ranks = [line["rank"] for line in lines_of(done.folder)]
    assert set(ranks) <= {1, 2, 3, 4}
    assert len(set(ranks)) > 1
    for step in range(2, STEPS + 1):
        before, after = done.states[step - 1][1]["adapters"], done.states[step][0]["adapters"]
        for path in before:
            moved_a = (before[path]["a"] != after[path]["a"]).any((0, 1))
            moved_b = (before[path]["b"] != after[path]["b"]).any((0, 2))
            assert moved_a.tolist() == moved_b.tolist() == [k + 1 == ranks[step - 1] for k in range(4)]


def test_dylora_is_evaluated_merged_and_exported_at_any_rank(files, tmp_path, runs):
    run, data = runs["dylora"].folder, ("--data", files["held_out"])
    cut, whole = (mor("eval", run, *data, *rank)[0]["metrics"]["loss"] for rank in (("--rank", "2"), ()))
    assert cut != whole
    merged = tmp_path / "merged"
    result, _ = mor("merge", run, "--output-dir", merged, "--rank", "2", "--batches", "1")
    assert result["exact"]
    np.testing.assert_allclose(mor("eval", merged, *data)[0]["metrics"]["loss"], cut, rtol=1e-5)
    folder = tmp_path / "adapter"
    mor("export", run, "--output-dir", folder, "--format", "safetensors", "--rank", "2")
    described = json.loads((folder / "adapter.json").read_text())["sites"]
    assert {(site["method"], site["options"]["rank"]) for site in described.values()} == {("lora", 2)}
    model = tmp_path / "model"
    mor("export", run, "--output-dir", model, "--rank", "2", "--batches", "1")
    assert (model / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    for command in (("eval", run, *data), ("merge", run, "--output-dir", tmp_path / "no")):
        _, error = mor(*command, "--rank", "5", code=2)
        assert "between 1 and the trained rank 4" in error
    _, error = mor("export", runs["lora"].folder, "--output-dir", tmp_path / "no", "--rank", "2", code=2)
    assert "one rank only" in error
    assert not (tmp_path / "no").exists()
