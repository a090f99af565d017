"""Joining, deciding, agreeing: what one process does alone, and what two real ones do together."""

import json

import jax
import numpy as np
import pytest
import tiny_runs
import two_processes
from distributed_checks import batch_hashes

from mor_jax import processes
from mor_jax.cli.launch import leave
from mor_jax.cli.main import main
from mor_jax.data import make_iterator
from mor_jax.models import abstract_params
from mor_jax.training import distributed
from mor_jax.training.build import build_run
from mor_jax.training.checkpoint import fingerprint
from mor_jax.training.config import save_config
from mor_jax.training.mesh import held_rows, make_mesh, put_batch


def config_of(files, folder, **fields):
    """A MoR whose kernels and factors are split over the devices of both processes; each device sums its gradients."""
    small = {"mesh": "fsdp=8", "batch_size": 16, "accumulate": 2, "targets": ("up_proj",), "save_every": 2}
    small |= {
        "dropout": 0.0,
        "options": {},
        "optimizer": "sgd",
        "optimizer_options": {"momentum": 0.9},
        "learning_rate": 0.3,
    }
    return tiny_runs.config_of(files, folder, **small | fields)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    return build_run(config_of(files, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("description", ["data=8", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("hosts", [2, 8])
def test_batches_have_the_same_hash_on_any_number_of_hosts(run, description, hosts):
    mesh, size, batches = make_mesh(description), 8, run.batches
    parts = (batches._examples, batches._plan, size, run.config.seed)
    whole = [next(iterator) for iterator in [make_iterator(*parts)] for _ in range(3)]
    held = [held_rows(mesh, size, list(own)) for own in np.split(mesh.devices.ravel(), hosts)]
    iterators = [make_iterator(*parts, held=rows) for rows in held]
    for wanted in whole:
        found = {name: np.full_like(value, -1) for name, value in wanted.items()}
        for rows, iterator in zip(held, iterators, strict=True):
            for name, value in next(iterator).items():
                found[name][rows] = value
        assert fingerprint(put_batch(found, mesh)) == fingerprint(put_batch(wanted, run.mesh))


def test_a_process_alone_decides_for_itself_and_leaves_as_it_likes(run):
    assert processes.is_alone()
    assert processes.is_first()
    assert distributed.first_decides(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        distributed.first_decides(lambda: int("no"))
    processes.barrier("nobody to wait for")
    distributed.check_same_everywhere({"seed": 1})
    assert processes.gathered(run.params) is not None
    assert leave(3, None) is None


def test_a_pulse_tells_the_largest_signal_and_counts_real_tokens(run):
    batch = next(make_iterator(run.batches._examples, run.batches._plan, 8))
    pulse = distributed.Pulse(run.mesh)
    told = pulse(15, put_batch(batch, run.mesh))
    assert {name: int(value) for name, value in told.items()} == {
        "signal": 15,
        "real_tokens": np.count_nonzero(batch["segment_ids"]),
    }
    assert {name: int(value) for name, value in pulse(None, {}).items()} == {"signal": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator", "host:1"], "--num-processes, --process-id missing"),
        (["--num-processes", "2", "--process-id", "0"], "--coordinator missing"),
        (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "give HOST:PORT of process 0"),
        (["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"], "must lie in 0..1"),
    ],
)
def test_processes_that_are_half_named_are_errors(words, message, capsys, tmp_path):
    code = main(["merge", str(tmp_path), "--output-dir", str(tmp_path / "merged"), *words])
    assert code == 2
    assert message in capsys.readouterr().err


def test_numbers_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(distributed.DistributedError, match="JAX_NUM_PROCESSES='two': give a whole number"):
        distributed.join()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "5")
    with pytest.raises(distributed.DistributedError, match="--process-id 5: must lie in 0..1"):
        distributed.join()


@pytest.mark.slow  # two processes that load model and data
def test_two_processes_hold_the_same_batches_and_read_only_their_slices(run, files, tmp_path):
    save_config(run.config, tmp_path / "run.yaml")
    script = two_processes.ROOT / "tests" / "training" / "distributed_checks.py"
    pair = two_processes.Pair(tmp_path / "logs", script, tmp_path / "run.yaml")
    assert pair.wait() == [0, 0]
    first, second = (json.loads(pair.output(number)) for number in range(2))
    run.batches.set_state({**run.batches.get_state(), "row": run.config.batch_size})  # they looked at one batch before
    for found in (first, second):
        assert found["devices"] == [4, 8]
        assert found["decided"] == {"number": 0}
        assert found["same"] is None
        assert found["gathered"] == list(range(16))
        assert found["base"] == fingerprint(run.params)
        assert found["pulse"]["signal"] == 15  # of process 1 alone
    assert first["hashes"] == second["hashes"] == batch_hashes(run)
    assert [first["first"], second["first"]] == [True, False]
    assert first["failed"] == ["DistributedError", "only process 0 can know", 2]
    assert second["failed"] == ["DecidedElsewhereError", "only process 0 can know", 2]
    assert first["other"] is None
    assert second["other"][0] == "DistributedError"
    assert "process 1: steps=1 and process 0 has 0" in second["other"][1]
    shapes = abstract_params(tiny_runs.SHAPE)
    whole = {
        "model.layers.0.mlp.up_proj.weight": shapes["layers"]["mlp"]["up_proj"]["kernel"].size // 2,
        "model.layers.1.mlp.down_proj.weight": shapes["layers"]["mlp"]["down_proj"]["kernel"].size // 2,
        "model.embed_tokens.weight": shapes["embed_tokens"]["embedding"].size,
    }
    for name, size in whole.items():
        assert first["read"][name] == second["read"][name] == size // 2, name
    assert jax.process_count() == 1
