"""What the demo measures: exact answers by task, and which experts each task uses.

All of it works on one batch of one example a row, of one shape, so that every function is compiled once: models of one
structure (the untuned base and all merges) come in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax.adapters import AdapterInputs
from mor_jax.data import load_examples, make_plan, parse_sources, single_pass
from mor_jax.injection import Adapted, init_probes
from mor_jax.merging.calibration import through_probes
from mor_jax.models import ModelConfig, make_model

ROW = 24  # tokens; the longest example has 22
SHUFFLES = 199  # of the control

Batch = Mapping[str, np.ndarray]
Gates = dict[str, np.ndarray]  # {gate path: (rows, layers, N)}


def read_rows(files: Mapping[str, Path], tokenizer: Any) -> Batch:
    """All records of the files, {task: path}, in one batch: (rows, ROW) int32 arrays, one example a row."""
    sources = parse_sources([f"{task}={path}" for task, path in files.items()])
    examples = load_examples(sources, tokenizer, ROW, "error", tasks=tuple(files))
    (batch,) = single_pass(examples, make_plan(examples, ROW, mode="padded"), len(examples))
    return batch


def _inputs(batch: Mapping[str, Any], **changed: Any) -> AdapterInputs:
    names = ("segment_ids", "prompt_mask", "task_ids", "positions")
    return AdapterInputs(**({name: batch[name] for name in names} | changed))


class Forward:
    """Compiled passes of one structure: the decoder, or the decoder with the adapters of one plan."""

    def __init__(self, config: ModelConfig, plan: Any = None):
        decoder = make_model(config)
        self.plan = plan
        self._module = decoder if plan is None else Adapted(base=decoder, plan=plan)
        self._logits = jax.jit(self._run)
        self._gates = jax.jit(self._row_gates, static_argnames="rows")

    def _run(self, variables: Any, batch: Any, inputs: AdapterInputs | None = None) -> jax.Array:
        extra: dict[str, Any] = {}
        if self.plan is not None:
            extra["adapter_inputs"] = _inputs(batch) if inputs is None else inputs
        arguments = (batch["input_ids"], batch["positions"], batch["segment_ids"])
        return self._module.apply(variables, *arguments, **extra)  # pyright: ignore[reportReturnType]

    def _row_gates(self, variables: Any, batch: Any, rows: int) -> Any:
        inputs = _inputs(batch, num_tasks=rows)
        run = lambda probes: self._run({**variables, "adapter_probes": probes}, batch, inputs)  # noqa: E731
        return through_probes(run, init_probes(self.plan, rows))

    def logits(self, variables: Any, batch: Batch) -> jax.Array:
        """(rows, ROW, V)."""
        return self._logits(variables, dict(batch))

    def row_gates(self, variables: Any, batch: Batch) -> Gates:
        """Mean gates of each row, over the positions where it answers."""
        counted = batch["loss_mask"] > 0
        rows = len(counted)
        numbers = np.where(counted, np.arange(rows)[:, None], -1).astype(np.int32)  # a row is a task; -1 is none
        found = self._gates(variables, dict(batch) | {"task_ids": numbers}, rows=rows)
        means = {}
        for path, sums in found.items():
            load, count = np.asarray(sums["task_load"], np.float64), np.asarray(sums["task_count"], np.float64)
            means[path] = np.moveaxis(load / count[..., None], -2, 0)
        return means


def answers_right(logits: jax.Array, batch: Batch) -> np.ndarray:
    """(rows,) bool: whether greedy generation would give the row's whole answer and end there.

    Greedy decoding follows the reference exactly as long as the likeliest next token is the reference's, so one pass
    over prompt and answer decides it.
    """
    wrong = (np.asarray(logits.argmax(-1)) != batch["targets"]) & (batch["loss_mask"] > 0)
    return ~wrong.any(axis=1)


def accuracy(logits: jax.Array, batch: Batch, tasks: Sequence[str]) -> dict[str, float]:
    """Share of exact answers of each task, and their `mean`."""
    right, rows = answers_right(logits, batch), batch["task_ids"][:, 0]
    found = {task: float(right[rows == number].mean()) for number, task in enumerate(tasks)}
    return found | {"mean": float(np.mean(list(found.values())))}


def task_gates(gates: Gates, rows: np.ndarray, tasks: int) -> Gates:
    """Mean gates of each task: {path: (tasks, layers, N)}.

    Args:
      gates: of each row.
      rows: (rows,) the task of each.
      tasks: how many.
    """
    return {path: np.stack([own[rows == task].mean(0) for task in range(tasks)]) for path, own in gates.items()}


def spread(by_task: Gates) -> float:
    """How much expert use depends on the task: the mean total variation distance of a task's gates from the average.

    0 when all tasks use the experts alike; over tasks, layers and sites.
    """
    return float(np.mean([0.5 * np.abs(own - own.mean(0)).sum(-1).mean() for own in by_task.values()]))


def expert_use(gates: Gates, rows: np.ndarray, tasks: int, seed: int) -> tuple[dict[str, float], Gates, Gates]:
    """`spread` by task against the same with the rows' task labels shuffled.

    Args:
      gates: mean gates of each row.
      rows: (rows,) its task.
      tasks: how many tasks.
      seed: of the shuffles.

    Returns:
      ({`by_task`, `shuffled_mean`, `shuffled_max`, `p_value`}, gates by task, gates by the last shuffled labels). The
      p-value is that of the permutation test: the share of labellings, the true one included, whose spread is as large.
    """
    true = task_gates(gates, rows, tasks)
    generator = np.random.default_rng(seed)
    shuffled, control = [], true
    for _ in range(SHUFFLES):
        control = task_gates(gates, generator.permutation(rows), tasks)
        shuffled.append(spread(control))
    figures = {"by_task": spread(true), "shuffled_mean": float(np.mean(shuffled)), "shuffled_max": max(shuffled)}
    at_least = sum(value >= figures["by_task"] for value in shuffled)
    return figures | {"p_value": (1 + at_least) / (1 + SHUFFLES)}, true, control
