"""A run that is killed anywhere and resumed in new processes ends bit for bit like one that never stopped."""

import signal
import time

import jax
import numpy as np
import pytest
import tiny_runs
from jax.sharding import PartitionSpec

from mor_jax.models import abstract_params
from mor_jax.training.checkpoint import Checkpoints
from mor_jax.training.config import save_config
from mor_jax.training.mesh import make_mesh
from mor_jax.training.sharding import param_specs

STEPS, SAVE_EVERY = 40, 3
KILLS = ("in a save", "anywhere", "in a save", "anywhere", "in a save")


def _config(files, output_dir):
    fields = {"batch_size": 32, "mesh": tiny_runs.MIXED_MESH, "steps": STEPS, "save_every": SAVE_EVERY}
    return tiny_runs.config_of(files, output_dir, **fields)


def _finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return output


def _newest(run):
    return (Checkpoints(run / "checkpoints").steps() or [0])[-1]


def _start(run, *arguments):
    """A process that has restored what there is and cut the lines after it, into a new file."""
    written = run / "metrics.jsonl"
    before = written.stat().st_ino if written.exists() else 0
    process = tiny_runs.start(*arguments)
    tiny_runs.wait_until(lambda: written.exists() and written.stat().st_ino != before, process)
    return process


def _kill(process, run, where, rng):
    """SIGKILL at a random step, or as soon as a save is under way."""
    if where == "in a save":
        tiny_runs.wait_until(lambda: tiny_runs.unfinished_save(run), process)
        time.sleep(rng.uniform(0, 0.02))
    else:
        steps = _newest(run) + int(rng.integers(SAVE_EVERY + 1, 3 * SAVE_EVERY))
        tiny_runs.wait_until(lambda: len(tiny_runs.lines(run)) >= steps, process)
        time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def _stop(process, run, number, code):
    """A signal that saves: nothing is lost, and the exit code says that the run is not done."""
    before = _newest(run)
    tiny_runs.wait_until(lambda: len(tiny_runs.lines(run)) > before, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors[-2000:]
    assert output == ""
    assert Checkpoints(run / "checkpoints").newest() is not None
    assert _newest(run) == tiny_runs.lines(run)[-1]["step"] < STEPS
    assert not (run / "adapter").exists()


def test_the_mixed_mesh_really_shards():
    mesh = make_mesh(tiny_runs.MIXED_MESH)
    specs = param_specs(abstract_params(tiny_runs.SHAPE), mesh)
    for name in ("up_proj", "down_proj"):
        assert "fsdp" in specs["layers"]["mlp"][name]["kernel"]
    assert PartitionSpec() in jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


@pytest.mark.slow  # nine processes, because only a new process proves that a checkpoint holds everything
def test_five_kills_sigterm_and_ctrl_c_change_no_bit(files, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    save_config(_config(files, whole), tmp_path / "whole.yaml")
    save_config(_config(files, broken), tmp_path / "broken.yaml")
    _finish(tiny_runs.start(tmp_path / "whole.yaml"))
    rng = np.random.default_rng(0)
    arguments = [tmp_path / "broken.yaml"]
    for where in KILLS:
        _kill(_start(broken, *arguments), broken, where, rng)
        reached = len(tiny_runs.lines(broken))
        assert _newest(broken) >= reached - 2 * SAVE_EVERY  # a whole interval, and the save that was under way
        arguments = [broken / "config.yaml", "--resume"]
    _stop(_start(broken, *arguments), broken, signal.SIGTERM, 143)
    _stop(_start(broken, *arguments), broken, signal.SIGINT, 130)
    _finish(tiny_runs.start(*arguments))
    tiny_runs.assert_same_end(whole, broken, STEPS)
