"""What the host does around the steps: its order, what it writes, in which dtypes, and what a restart compiles."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import tiny_runs
from safetensors.numpy import load_file

from mor_jax.training import build_run, save_config, train
from mor_jax.training.loop import _Loop
from mor_jax.training.step import Step

SMALL = {"method": "lora", "mesh": "data=1", "accumulate": 1, "dropout": 0.0}
COUNT_MISSES = """
import sys
import jax
missed = []
jax.monitoring.register_event_listener(lambda name, **_: missed.append(name) if name.endswith("cache_misses") else None)
from mor_jax.cli.main import main
code = main(sys.argv[1:])
print(len(missed))
sys.exit(code)
"""


def test_metrics_are_read_one_step_late_and_the_next_batch_is_placed_while_a_step_runs(files, tmp_path, monkeypatch):
    seen = []

    def record(cls, name, label):
        original = getattr(cls, name)

        def recorded(self, *args, **options):
            seen.append(label(*args))
            return original(self, *args, **options)

        monkeypatch.setattr(cls, name, recorded)

    record(Step, "__call__", lambda *_: "step")
    record(_Loop, "_next_batch", lambda *_: "batch")
    record(_Loop, "_report", lambda pending: f"report {pending[0]}" if pending else None)
    train(tiny_runs.config_of(files, tmp_path / "run", steps=4, save_every=0, **SMALL))
    expected = "batch step batch step report 1 batch step report 2 batch step report 3 report 4"
    assert " ".join(filter(None, seen)) == expected


def test_a_run_in_bfloat16_keeps_its_adapters_in_float32_and_writes_what_memory_it_took(files, tmp_path):
    config = tiny_runs.config_of(files, tmp_path / "run", steps=12, dtype="bfloat16", learning_rate=0.02, **SMALL)
    run = build_run(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {jnp.dtype(jnp.bfloat16)}
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["loss"] for line in lines[-3:]) < sum(line["loss"] for line in lines[:3]) - 0.3
    assert all(line["peak_rss_bytes"] > 10**7 and "peak_device_bytes" in line for line in lines)
    arrays, _ = tiny_runs.read_checkpoint(tmp_path / "run", 12)
    floats = [leaf.dtype for leaf in jax.tree.leaves(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) > 6
    assert set(floats) == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype.name for leaf in load_file(tmp_path / "run" / "adapter" / "adapter.safetensors").values()} == {
        "float32"
    }


def test_a_run_that_goes_on_in_another_process_finds_all_its_programs_in_the_cache(files, tmp_path):
    run = tmp_path / "run"
    config = tiny_runs.config_of(files, run, steps=4, save_every=2, compile_cache=str(tmp_path / "compiled"), **SMALL)
    save_config(config, tmp_path / "run.yaml")

    def missed(*words):
        command = [sys.executable, "-c", COUNT_MISSES, "train", *map(str, words), "--json"]
        own, root = os.environ | {"USE_TORCH": "0"}, Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=own, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    assert missed(tmp_path / "run.yaml") > 5
    shutil.rmtree(run / "checkpoints" / "4")  # as if it had been killed after the first checkpoint
    shutil.rmtree(run / "adapter")
    assert missed(run / "config.yaml", "--resume") == 0
    assert len(tiny_runs.lines(run)) == 4
