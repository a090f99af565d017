"""Rows about compiling.

32 layers against 4 (C8), a warm cache against a cold one (C9), what is compiled after the first step of a run (C10).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from programs import Shape, adapter_step, make_batch, make_params

import mor_jax
from mor_jax.adapters import LoRA
from mor_jax.training.build import build_run
from mor_jax.training.config import TrainConfig
from mor_jax.training.loop import run_training

DEMO_BASE = Path(mor_jax.__file__).parent / "cli" / "demo" / "base"


def many_layers(shape: Shape, rounds: int) -> Iterator[dict[str, Any]]:
    """C8: CPU time to trace, lower and compile the LoRA step of 32 layers ÷ of 4, in turn, without a cache."""
    times: dict[int, list[float]] = {32: [], 4: []}
    for _ in range(rounds):
        for layers, own in times.items():
            other = shape.with_model(num_layers=layers)
            step = adapter_step(LoRA(rank=16), other.model, make_params(other), make_batch(other))
            start = time.process_time()
            step.compile("LoRA r16")
            own.append(time.process_time() - start)
    ratios = [many / few for many, few in zip(times[32], times[4], strict=True)]
    note = f"{statistics.median(times[32]):.1f} and {statistics.median(times[4]):.1f} s of CPU time, {rounds} rounds"
    figure = statistics.median(ratios)
    yield {"id": "C8", "what": "compile 32 layers ÷ 4 layers", "must": "<= 1.3", "figure": figure, "note": note}


def _first_step_seconds(shape_name: str, cache: str) -> tuple[float, float]:
    """CPU and wall seconds of a process that takes one step."""
    script = Path(__file__).with_name("first_step.py")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, str(script), shape_name, cache], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def warm_cache(shape_name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """C9: process start to first step done with a warm cache of programs ÷ with a cold one, CPU time."""
    cold, warm, walls = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_first_step_seconds(shape_name, cache))
            warm.append(_first_step_seconds(shape_name, cache))
            walls.append(warm[-1][1] / cold[-1][1])
    figure = statistics.median(w[0] / c[0] for w, c in zip(warm, cold, strict=True))
    seconds = [statistics.median(found[0] for found in times) for times in (warm, cold)]
    note = f"{seconds[0]:.1f} and {seconds[1]:.1f} s of CPU time, {rounds} rounds"
    note += f"; by wall time {statistics.median(walls):.2f}"
    what = "process start to first step: warm ÷ cold cache"
    yield {"id": "C9", "what": what, "must": "<= 0.35", "figure": figure, "note": note}


class CountingBatches:
    """A run's batches that note, each time one is taken, how many programs were compiled so far."""

    def __init__(self, batches: Any, compiled: list[str]):
        """Wraps ``batches``; ``compiled`` grows elsewhere."""
        self.batches, self.compiled, self.seen = batches, compiled, []

    def __next__(self) -> Any:
        """The next batch."""
        self.seen.append(len(self.compiled))
        return next(self.batches)

    def get_state(self) -> dict[str, Any]:
        """The batches' own."""
        return self.batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """The batches' own."""
        self.batches.set_state(state)


def _write_records(folder: Path) -> None:
    for name, count in (("train", 96), ("held_out", 21)):
        records = [{"prompt": f"copy {n * 7919 % 1000}", "completion": f" {n * 7919 % 1000}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def compilations(methods: tuple[str, ...], steps: int = 200) -> Iterator[dict[str, Any]]:
    """C10: programs compiled after step one of a run with evaluation, checkpoints and a short last evaluation batch."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_records(folder)
        for method in methods:
            config = TrainConfig(
                model=str(DEMO_BASE),
                data=(str(folder / "train.jsonl"),),
                eval_data=(str(folder / "held_out.jsonl"),),
                method=method,
                output_dir=str(folder / method),
                steps=steps,
                sequence_length=64,
                packing=False,
                eval_every=steps // 4,
                eval_batches=0,
                save_every=steps // 4,
                mesh="data=1",
            )
            run = build_run(config)
            batches = CountingBatches(run.batches, compiled)
            run_training(dataclasses.replace(run, batches=batches))
            after_first = len(compiled) - batches.seen[-steps]
            what = f"programs compiled after step 1 of {steps}, {method}"
            yield {"id": "C10", "what": what, "must": "<= 0", "figure": after_first}
