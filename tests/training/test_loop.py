"""The loop within one process: what a run leaves behind, resuming, refusing, and stopping at what is not finite."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from mor_jax.adapters import AdapterInputs
from mor_jax.cli.main import exit_code, main
from mor_jax.injection import Adapted
from mor_jax.models import Decoder
from mor_jax.training import TrainConfig, build_run, checkpoint, load_config, run_training, save_config, train
from mor_jax.training.adapter_file import load_adapter, read_description
from mor_jax.training.build import base_config
from mor_jax.training.checkpoint import Checkpoints
from mor_jax.training.config import ConfigError
from mor_jax.training.integrity import IntegrityError, verify_manifest
from mor_jax.training.losses import cross_entropy
from mor_jax.training.step import NonFiniteError

pytestmark = pytest.mark.usefixtures("quick_compilation")

# one device: the compiled step is the cheapest
SMALL = {"mesh": "data=1", "steps": 8}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """(folder, result) of a MoR run on one device with evaluation and saves."""
    run = tmp_path_factory.mktemp("runs") / "mor"
    held_out = (f"add={files}/held_out_add.jsonl", f"shout={files}/held_out_shout.jsonl")
    config = tiny_runs.config_of(files, run, eval_data=held_out, eval_every=3, eval_batches=0, **SMALL)
    return run, train(config)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run to break."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _back_to(run, step):
    """The run as it was just after the checkpoint of `step`."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter")


def test_the_run_folder_and_the_result(finished):
    run, result = finished
    assert result["steps"] == 8
    written = tiny_runs.lines(run)
    np.testing.assert_allclose(result["loss"], np.mean([line["loss"] for line in written]), rtol=1e-6)
    assert result["tokens_per_second"] > 0
    assert result["output_dir"] == str(run)
    assert load_config(run / "config.yaml").output_dir == str(run)
    assert set(json.loads((run / "environment.json").read_text())) >= {"versions", "git_commit", "devices"}
    assert list(run.glob("events.out.tfevents.*"))
    assert Checkpoints(run / "checkpoints").steps() == [4, 8]
    described = read_description(run / "adapter")
    assert (described["tasks"], described["steps"]) == (["add", "shout"], 8)
    assert described["base_fingerprint"]
    assert sum(np.prod(shape) for shape in described["shapes"].values()) == result["trainable_parameters"]


def test_evaluation_is_where_it_was_asked_for_and_equals_a_loss_over_whole_logits(finished, files):
    run, result = finished
    written = tiny_runs.lines(run)
    assert [line["step"] for line in written if "eval_loss" in line] == [3, 6, 8]
    assert written[-1]["eval_loss"] == result["eval_loss"]
    config = load_config(run / "config.yaml")
    shape = base_config(config)
    params = build_run(config).params
    plan, leaves, _ = load_adapter(run / "adapter", Decoder(shape), params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    adapted, sums = Adapted(base=Decoder(shape), plan=plan), {}

    @jax.jit
    def naive(batch):
        inputs = AdapterInputs(segment_ids=batch["segment_ids"])
        variables = {"params": params, "adapters": leaves.params, "adapter_state": {}, "adapter_constants": {}}
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        return adapted.apply(variables, *arguments, adapter_inputs=inputs)

    for batch in build_run(config).eval_batches():
        logits = naive(batch)
        for number, task in enumerate(("add", "shout")):
            mask = jnp.asarray(batch["loss_mask"]) * (batch["task_ids"] == number)
            sums[task] = sums.get(task, 0) + np.array(cross_entropy(logits, jnp.asarray(batch["targets"]), mask))
    for task, (total, tokens) in sums.items():
        np.testing.assert_allclose(result["eval_loss_by_task"][task], total / tokens, rtol=1e-5)
    total, tokens = sums["add"] + sums["shout"]
    np.testing.assert_allclose(result["eval_loss"], total / tokens, rtol=1e-5)
    assert result["eval_tokens"] == tokens


def test_the_routers_are_in_the_metrics(finished):
    line = tiny_runs.lines(finished[0])[-1]
    assert set(line["router"]) == {"layers/mlp/up_proj", "layers/mlp/down_proj"}
    for router in line["router"].values():
        np.testing.assert_allclose(sum(router["load"]), 1, rtol=1e-5)
        assert 0 < router["entropy"] <= np.log(3) + 1e-6
        for gates in router["task_gates"].values():
            np.testing.assert_allclose(sum(gates), 1, rtol=1e-5)
    assert {"add", "shout"} == set(line["router"]["layers/mlp/up_proj"]["task_gates"])
    assert 1 / 3 <= line["router_max_load"] <= 1
    assert line["router_balance"] > 0


@pytest.mark.parametrize(("method", "size"), [("mor", {}), ("alora", {"batch_size": 2, "accumulate": 1})])
def test_nothing_compiles_after_the_first_step(files, tmp_path, monkeypatch, method, size):
    """Nor does a method's event when it is first due, in the middle of the run."""
    compiled, seen = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    from mor_jax.training import loop

    plain = loop._Loop._next_batch
    monkeypatch.setattr(loop._Loop, "_next_batch", lambda self: seen.append(len(compiled)) or plain(self))
    held_out = (f"add={files}/held_out_add.jsonl", f"shout={files}/held_out_shout.jsonl")
    fields = {"eval_data": held_out, "eval_every": 2, "eval_batches": 0, "steps": 9, "method": method}
    train(tiny_runs.config_of(files, tmp_path / "run", **SMALL | fields | size))
    assert compiled  # the listener hears something
    happened = {name for line in tiny_runs.lines(tmp_path / "run") for name in line.get("events", {})}
    assert happened == ({"reallocate"} if method == "alora" else set())
    assert len(seen) == 9
    assert set(seen) == {seen[0]}
    assert len(compiled) == seen[0]


@pytest.mark.parametrize(("method", "mesh"), [("lora", "data=1"), ("lora", tiny_runs.MIXED_MESH), ("mor", "data=1")])
def test_resumed_equals_uninterrupted(files, tmp_path, method, mesh, request):
    """The fourth pair, MoR on the mixed mesh, is that of the kills."""
    fields = {"method": method, "mesh": mesh, "batch_size": 8 if mesh == "data=1" else 32, "steps": 8}
    whole = tmp_path / "whole"
    train(tiny_runs.config_of(files, whole, **fields))
    shutil.copytree(whole, tmp_path / "resumed")
    _back_to(tmp_path / "resumed", 4)
    train(tiny_runs.config_of(files, tmp_path / "resumed", resume=True, **fields))
    tiny_runs.assert_same_end(whole, tmp_path / "resumed", 8)


def test_a_flipped_bit_in_any_file_is_found_and_named(finished, copy):
    whole = {}
    for folder in (copy / "checkpoints" / "8", copy / "adapter"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
            whole[path] = path.read_bytes()
            _flip(path)
            assert verify_manifest(folder) == [path.relative_to(folder).as_posix()]
            path.write_bytes(whole[path])
    kinds = {path.relative_to(copy).parts[:3][-1] for path in whole}
    assert {"adapters", "opt_state", "counters", "metadata", "adapter.safetensors", "adapter.json"} <= kinds
    assert "manifest.json" in {path.name for path in whole}


def test_resume_falls_back_to_the_checkpoint_before_a_bad_one(finished, copy, monkeypatch):
    run, _ = finished
    bad = next(path for path in (copy / "checkpoints" / "8" / "opt_state").rglob("d/*") if path.is_file())
    _flip(bad)
    verified = []
    monkeypatch.setattr(
        checkpoint, "verify_manifest", lambda folder: verified.append(folder.name) or verify_manifest(folder)
    )
    train(dataclasses.replace(load_config(copy / "config.yaml"), output_dir=str(copy), resume=True))
    assert verified.count("4") == 1  # large models have large checkpoints
    assert (copy / "checkpoints" / "bad" / "8").is_dir()
    tiny_runs.assert_same_end(run, copy, 8)


def test_a_bad_adapter_is_not_opened(copy):
    _flip(copy / "adapter" / "adapter.safetensors")
    with pytest.raises(IntegrityError, match=r"adapter\.safetensors"):
        read_description(copy / "adapter")


def test_no_good_checkpoint_left_is_a_fault(copy, capsys):
    for step in (4, 8):
        _flip(copy / "checkpoints" / str(step) / "manifest.json")
    assert main(["train", str(copy / "config.yaml"), "--resume"]) == 3
    assert "manifest.json" in capsys.readouterr().err.splitlines()[-1]


def _tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "output_dir="),
        (["--resume", "--rank", "4"], "rank=4: the checkpoint was trained with 2"),
        (["--resume", "--learning-rate", "0.5"], "learning_rate=0.5"),
        (["--resume", "--steps", "20"], "steps=20"),
        (["--resume", "--accumulate", "2"], "accumulate=2"),
        (["--resume", "--data", "add=OTHER"], "data=.*another packing plan"),
        (["--resume", "--model", "OTHER"], "model=.*weights are not those"),
    ],
)
def test_what_does_not_belong_to_the_run_is_refused_and_changes_nothing(copy, files, tmp_path, capsys, words, message):
    other_data = tiny_runs.tiny_llama.write_records(tmp_path / "other.jsonl", 20)
    if "--model" in words:
        shutil.copytree(files / "model", tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    names = {"add=OTHER": f"add={other_data}", "OTHER": str(tmp_path / "model")}
    before = _tree(copy)
    where = ["--output-dir", str(copy)]
    assert main(["train", str(copy / "config.yaml"), *where, *(names.get(word, word) for word in words)]) == 2
    assert _tree(copy) == before
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "nowhere"), ("data", ("nowhere.jsonl",)), ("mesh", "data=16"), ("targets", ("qproj",))],
)
def test_bad_input_writes_nothing(files, tmp_path, field, value):
    with pytest.raises(ValueError, match=r"nowhere|mesh=|qproj") as caught:
        train(dataclasses.replace(tiny_runs.config_of(files, tmp_path / "run"), **{field: value}))
    assert exit_code(caught.value) == 2
    assert not (tmp_path / "run").exists()


def test_resume_without_anything_starts_and_a_constant_schedule_may_go_on(files, tmp_path):
    fields = SMALL | {"schedule": "constant", "method": "lora"}
    first = train(tiny_runs.config_of(files, tmp_path / "run", resume=True, **fields | {"steps": 4}))
    assert first["steps"] == 4
    train(tiny_runs.config_of(files, tmp_path / "run", resume=True, **fields))
    train(tiny_runs.config_of(files, tmp_path / "whole", **fields))
    tiny_runs.assert_same_end(tmp_path / "whole", tmp_path / "run", 8)
    before = _tree(tmp_path / "run")
    with pytest.raises(ConfigError, match="steps=4: the checkpoint is of step 8: give at least that"):
        train(tiny_runs.config_of(files, tmp_path / "run", resume=True, **fields | {"steps": 4}))
    assert _tree(tmp_path / "run") == before


class _Poisoned:
    """Batches of which the sixth holds a token that the loss of the test below turns into NaN."""

    def __init__(self, batches):
        self._batches, self._count = batches, 0

    def __next__(self):
        batch = dict(next(self._batches))
        self._count += 1
        batch["poison"] = np.full_like(batch["input_ids"], self._count == 7)  # one was taken for its shape
        return batch

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(files, tmp_path):
    run = build_run(tiny_runs.config_of(files, tmp_path / "run", method="lora", **SMALL | {"save_every": 2}))

    def loss(variables, batch, inputs):
        total, tokens = run.loss(variables, batch, inputs)
        return total * jnp.where(jnp.any(batch["poison"] > 0), jnp.nan, 1.0), tokens

    with pytest.raises(NonFiniteError, match="step 6: loss is not finite") as caught:
        run_training(dataclasses.replace(run, loss=loss, batches=_Poisoned(run.batches)))
    assert caught.value.exit_code == 3
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 4]
    arrays, _ = tiny_runs.read_checkpoint(tmp_path / "run", 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays))
    assert tiny_runs.lines(tmp_path / "run")[-1]["step"] == 5


def test_an_optimizer_made_in_python_trains_and_is_asked_for_again(files, tmp_path):
    import optax

    config = tiny_runs.config_of(files, tmp_path / "run", method="lora", **SMALL | {"steps": 4})
    train(config, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="optimizer: the checkpoint's was made in Python"):
        train(dataclasses.replace(config, resume=True))
    assert isinstance(config, TrainConfig)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
