"""Two real processes train what one does: killed, stopped by a signal, resumed, then evaluated, merged and exported."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file
from test_distributed import config_of
from two_processes import COMMAND, Pair

from mor_jax.cli.main import main
from mor_jax.training.checkpoint import Checkpoints
from mor_jax.training.config import save_config
from mor_jax.training.integrity import verify_manifest
from mor_jax.training.loop import train

STEPS = 12


def _steps(run):
    return len(tiny_runs.lines(run))


def _newest(run):
    return (Checkpoints(run / "checkpoints").steps() or [0])[-1]


def _lose_one(pair, run):
    """SIGKILL to process 1: the other ends by itself, with one line, and its checkpoints are whole."""
    pair.wait_until(lambda: _newest(run) >= 2 and _steps(run) >= 3)
    pair.processes[1].kill()
    killed = time.monotonic()
    assert pair.wait(seconds=60) == [3, -signal.SIGKILL]
    assert time.monotonic() - killed < 60
    (line,) = pair.messages(0)
    assert line.startswith("mor: process 0 of 2: another process was lost")
    assert not (run / "adapter").exists()


def _stop_one(pair, run, before):
    """SIGTERM to process 1 alone, after a new step: both save the same step and exit alike; nothing is lost."""
    written = run / "metrics.jsonl"
    pair.wait_until(lambda: written.stat().st_ino != before and _steps(run) > _newest(run))
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [143, 143]
    assert pair.output(0) == pair.output(1) == ""
    assert _newest(run) == _steps(run) < STEPS
    assert verify_manifest(run / "checkpoints" / str(_newest(run))) == []


def _assert_like_one(one, two):
    """Equal to fp32 rounding; token counts and the place in the data exactly."""
    ours, theirs = tiny_runs.lines(one), tiny_runs.lines(two)
    assert [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tokens"] == other["tokens"]
        for name in ("loss", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(other[name], mine[name], rtol=1e-5)
    arrays, metadata = tiny_runs.read_checkpoint(one, STEPS)
    others, other_metadata = tiny_runs.read_checkpoint(two, STEPS)
    assert metadata["iterator"] == other_metadata["iterator"]
    assert metadata["base_fingerprint"] == other_metadata["base_fingerprint"]
    assert set(arrays) == set(others)
    first, second = (load_file(run / "adapter" / "adapter.safetensors") for run in (one, two))
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def two(files, tmp_path_factory):
    """A run of two processes that lost one of them, was stopped by a signal to one, and went on twice."""
    folder = tmp_path_factory.mktemp("two")
    run = folder / "run"
    save_config(config_of(files, run, steps=STEPS), folder / "run.yaml")
    _lose_one(Pair(folder / "first", *COMMAND, "train", folder / "run.yaml", "--json"), run)
    again = (*COMMAND, "train", run / "config.yaml", "--resume", "--json")
    before = (run / "metrics.jsonl").stat().st_ino  # who resumes cuts the lines into a new file
    _stop_one(Pair(folder / "second", *again), run, before)
    pair = Pair(folder / "third", *again)
    assert pair.wait() == [0, 0]
    assert json.loads(pair.output(0))["steps"] == STEPS
    assert pair.output(1) == ""
    assert "step/s" in pair.errors(0)
    assert "step/s" not in pair.errors(1)
    assert pair.messages(1) == []
    return run


@pytest.mark.slow  # six processes: only real ones can be killed
def test_two_processes_that_were_killed_and_stopped_train_what_one_does(two, files, tmp_path):
    train(config_of(files, tmp_path / "one", steps=STEPS))
    _assert_like_one(tmp_path / "one", two)


def _commands(run, files, folder):
    """A merge by gates, which is exact in them; a LoRA fitted by least squares and distillation; figures; text."""
    few = ("--batches", "2", "--steps", "2", "--json", "--output-dir")
    held_out = f"add={files}/held_out_add.jsonl"
    return [
        ["merge", str(run), "--gates", "mean", *few, str(folder / "merge")],
        ["export", str(run), "--format", "peft", "--gates", "distill", "--verify", *few, str(folder / "export")],
        ["export", str(run), "--gates", "mean", "--dtype", "float16", *few, str(folder / "half")],
        ["eval", str(run), "--data", held_out, "--sequence-length", "48", "--json"],
        ["generate", str(run), "--prompt", "add 1:", "--max-new-tokens", "4", "--greedy", "--json"],
    ]


@pytest.mark.slow  # two processes
def test_two_processes_merge_export_evaluate_and_generate_what_one_does(two, files, tmp_path, capsys):
    """On all eight devices, where one process alone uses one."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    (tmp_path / "commands.json").write_text(json.dumps(_commands(two, files, together)))
    script = Path(__file__).parent / "several_commands.py"
    pair = Pair(tmp_path / "logs", script, tmp_path / "commands.json")
    expected = []
    for command in _commands(two, files, alone):
        capsys.readouterr()
        assert main(command) == 0
        expected.append(json.loads(capsys.readouterr().out))
    assert pair.wait() == [0, 0]
    assert pair.output(1) == ""
    found = [json.loads(line) for line in pair.output(0).splitlines()]
    for name in ("merge", "export", "half"):
        files_of = [sorted(path.name for path in (folder / name).iterdir()) for folder in (together, alone)]
        assert files_of[0] == files_of[1]
        assert verify_manifest(together / name) == []
    ours, theirs = (load_file(folder / "merge" / "model.safetensors") for folder in (together, alone))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-6, err_msg=name)  # gates are sums over tokens
    (merged, exported, half, evaluated, generated), (_, _, _, own, text) = found, expected
    assert half["verified"] is True
    halves = [load_file(folder / "half" / "model.safetensors") for folder in (together, alone)]
    for name, value in halves[0].items():
        assert value.dtype == np.float16
        np.testing.assert_allclose(value, halves[1][name], rtol=2**-10, atol=1e-6, err_msg=name)
    assert merged["kl"] < 1e-6
    assert exported["verified"] is True
    assert exported["verified_with"] == "mor_jax"  # torch knows nothing of the other process
    assert exported["fidelity"]["kl"] < 1e-6
    assert evaluated.pop("metrics") == pytest.approx(own.pop("metrics"), rel=1e-6)  # float32 sums
    assert evaluated == own
    assert generated == text
