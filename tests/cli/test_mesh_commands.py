"""Commands on a model split over eight devices give what one device gives."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_bert
import tiny_llama as tiny
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from mor_jax.cli.main import main
from mor_jax.cli.merge import run_batches
from mor_jax.cli.opening import choose_devices, open_run
from mor_jax.cli.options import MergeOptions
from mor_jax.merging import least_squares
from mor_jax.merging.calibration import shard_inputs
from mor_jax.models import make_model
from mor_jax.training.mesh import MeshError, make_mesh
from mor_jax.training.sharding import on_devices

MESH = "data=2,fsdp=2,tensor=2"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A routed MoR on a model whose matrices are large enough to be split."""
    folder = tmp_path_factory.mktemp("split")
    shape = dataclasses.replace(tiny.CONFIG, hidden_size=64, intermediate_size=256)
    model = tiny.make_model(folder / "model", shape)
    return tiny.make_run(folder / "run", model, method="mor", num_experts=2, targets=("up_proj", "down_proj"))


def both(capsys, *words):
    """What a command prints with all devices, and with one."""
    found = []
    for mesh in (("--mesh", MESH), ()):
        capsys.readouterr()
        assert main([*(str(word).replace("MESH", mesh[-1] if mesh else "one") for word in words), *mesh, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    return found


def test_the_base_and_its_adapter_are_split(run):
    live = open_run(run, mesh=MESH)
    kernel = live.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 64 // 2, 256 // 2)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in (*live.leaves.params["layers/mlp/up_proj"].values(),))


def test_a_merge_is_that_of_one_device(run, tmp_path, capsys):
    words = ("--gates", "mean", "--batches", "2", "--output-dir", tmp_path / "MESH")
    split, whole = both(capsys, "merge", run, *words)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in (MESH, "one"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5, err_msg=name)  # gates are sums over tokens
    assert split["tokens"] == whole["tokens"]
    assert split["kl"] == pytest.approx(whole["kl"], rel=1e-3)
    assert split["kl"] > 1e-6  # of routed gates, so that there is something to compare


def test_least_squares_are_as_good_as_those_of_one_device(run, tmp_path, capsys):
    """The moments of few tokens leave much of the change itself open."""
    words = ("--gates", "sequential", "--batches", "2", "--output-dir", tmp_path / "MESH")
    split, whole = both(capsys, "merge", run, *words)
    assert split["kl"] == pytest.approx(whole["kl"], rel=2e-2)


def test_the_sums_of_a_calibration_are_split(run, tmp_path):
    """A site's are as large as its kernel in float32, and all sites' are held at once."""
    live = open_run(run, mesh=MESH)
    calibration, _ = run_batches(live, MergeOptions(run=run, output_dir=str(tmp_path), batches=2))
    with live.on_devices():
        model = make_model(live.config)
        found = least_squares(model, live.params, live.leaves, live.plan, calibration, sequential=False)
    for name, width in (("up_proj", 64), ("down_proj", 256)):
        for arrays in (found.changes, found.second_moments):
            array = arrays[f"layers/mlp/{name}"]
            assert array.sharding.shard_shape(array.shape)[1] == width // 8


def test_sums_stay_where_they_are_on_a_mesh_that_the_user_divides(run):
    """The axes of a plain `jax.make_mesh` are the user's to divide by; `least_squares` may be called under one."""
    value = jnp.ones((8, 8))
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        assert shard_inputs(value) is value
    assert shard_inputs(value) is value
    with on_devices(make_mesh("fsdp=8")):
        assert shard_inputs(jnp.ones((8, 8))).sharding.shard_shape((8, 8)) == (1, 8)


@pytest.mark.parametrize("command", ["merge", "export", "eval", "generate"])
def test_a_mesh_that_does_not_fit_is_refused(run, tmp_path, capsys, command):
    told = {"eval": ["--data", "x.jsonl"], "generate": ["--prompt", "x"]}
    words = told.get(command, ["--output-dir", str(tmp_path / "out")])
    assert main([command, run, *words, "--mesh", "tensor=8"]) == 2
    assert "tensor=8 does not divide 4 heads" in capsys.readouterr().err


def test_rows_that_the_devices_do_not_share_are_refused(run):
    live = open_run(run, mesh=MESH)
    assert (live.padded_rows(1), live.padded_rows(4), live.padded_rows(5)) == (4, 4, 8)
    with pytest.raises(MeshError, match="a batch of 3 rows: the devices need a multiple of 4"):
        live.logits_fn()({"input_ids": np.zeros((3, 8), np.int32)})


def test_a_batch_larger_than_all_rows_still_leaves_one_to_choose_by_and_one_to_report(run, tmp_path):
    live = open_run(run, mesh="data=8")
    for batches in run_batches(live, MergeOptions(run=run, output_dir=str(tmp_path), batches=2)):
        assert [len(batch["input_ids"]) for batch in batches] == [8] * len(batches)
        filled = [int((batch["segment_ids"] > 0).any(axis=1).sum()) for batch in batches]
        assert max(filled) <= 4 or len(batches) > 1


def test_an_export_is_verified_where_it_lies(run, tmp_path, capsys):
    words = ("--format", "safetensors", "--verify", "--output-dir", tmp_path / "MESH")
    split, _ = both(capsys, "export", run, *words)
    assert split["verified"] is True
    assert split["max_logit_difference"] == 0
    ours, theirs = (load_file(tmp_path / name / "adapter.safetensors") for name in (MESH, "one"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def test_figures_and_texts_are_those_of_one_device(run, tmp_path, capsys):
    data = tiny.write_records(tmp_path / "held_out.jsonl", count=5)
    words = ("--data", data, "--batch-size", "3", "--sequence-length", "32")  # 3 rows become 4
    split, whole = both(capsys, "eval", run, *words)
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
    split, whole = both(capsys, "generate", run, "--prompt", "add 3:", "--greedy", "--max-new-tokens", "4")
    assert split == whole


def test_the_devices_are_chosen_by_what_divides():
    shape = dataclasses.replace(tiny.CONFIG, hidden_size=64, intermediate_size=256)
    assert choose_devices(shape)[0].size == 1  # virtual devices of one CPU share its memory and cores
    assert dict(choose_devices(shape, "fsdp=4,data=-1")[0].shape) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    with pytest.raises(MeshError, match="sequence is for training"):
        choose_devices(shape, "sequence=2,fsdp=4")
    with pytest.raises(MeshError, match="tensor=8 does not divide 4 heads"):
        choose_devices(shape, "tensor=8")


def test_every_accelerator_is_used_as_far_as_the_model_divides(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    shape = dataclasses.replace(tiny.CONFIG, hidden_size=60, num_heads=4, head_dim=16, intermediate_size=512)
    mesh, specs = choose_devices(shape)
    assert (mesh.shape["fsdp"], mesh.shape["data"]) == (4, 2)  # 60 does not divide by 8
    assert specs["layers"]["mlp"]["up_proj"]["kernel"] == PartitionSpec(None, "fsdp")
    assert choose_devices(tiny_bert.CONFIG)[0].size == 8
