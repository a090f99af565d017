"""The demo from data to summary: LoRA and MoR at equal size, expert use, merges, export, all in one folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.cli.demo import measure
from mor_jax.cli.demo.tasks import TASKS, write_tasks
from mor_jax.cli.opening import LiveModel, open_model, open_run
from mor_jax.data import load_tokenizer
from mor_jax.merging import (
    FidelityReport,
    language_model_call,
    least_squares,
    mean_gates,
    measure_fidelity,
    merge,
    merge_changes,
)
from mor_jax.models import make_model
from mor_jax.models.dtypes import STORED
from mor_jax.training.config import TrainConfig

BASE = Path(__file__).parent / "base"
METHODS: Mapping[str, Mapping[str, Any]] = {  # equal to 2 % in trained parameters; alpha / rank is 2 for both
    "lora": {"rank": 12, "alpha": 24.0},
    "mor": {"rank": 8, "alpha": 16.0, "num_experts": 4},
}
LEARNING_RATES: Mapping[str, float] = {"lora": 5e-3, "mor": 1e-2}  # from experiments/results/demo_grid.md
STEPS = 300
STRINGS = {"train": 1000, "validation": 100, "held_out": 100}  # each is asked in every task
NAMES = tuple(TASKS)
PIECES = 4  # batches that merges are calibrated on


@dataclass(frozen=True)
class Part:
    """One of the three sets of strings: its file for each task, and its rows as one batch."""

    files: Mapping[str, Path]
    rows: measure.Batch


def prepare(folder: Path, seed: int) -> dict[str, Part]:
    """Writes the data and reads the rows of "calibration" (the first training strings), "validation", "held_out"."""
    files = write_tasks(folder, STRINGS, seed)
    tokenizer = load_tokenizer(BASE)
    first = {task: path.with_suffix(".first.jsonl") for task, path in files["train"].items()}
    for task, path in first.items():
        lines = files["train"][task].read_text(encoding="utf-8").splitlines()[: STRINGS["held_out"]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = {"calibration": first, "validation": files["validation"], "held_out": files["held_out"]}
    parts = {name: Part(own, measure.read_rows(own, tokenizer)) for name, own in read.items()}
    return parts | {"train": Part(files["train"], {})}


def make_config(method: str, data: Part, folder: Path, seed: int, learning_rate: float | None = None) -> TrainConfig:
    """What both methods are trained with; only `METHODS` and the learning rate differ."""
    return TrainConfig(
        model=str(BASE),
        data=tuple(f"{task}={path}" for task, path in data.files.items()),
        method=method,
        output_dir=str(folder),
        steps=STEPS,
        batch_size=4,
        sequence_length=128,
        learning_rate=LEARNING_RATES[method] if learning_rate is None else learning_rate,
        warmup_steps=10,
        seed=seed,
        log_every=20,
        **METHODS[method],
    )


@dataclass(frozen=True)
class Fitted:
    """One trained method with its figures."""

    live: LiveModel
    forward: measure.Forward
    trainable_parameters: int
    step_seconds: float

    def accuracy(self, rows: measure.Batch) -> dict[str, float]:
        """Share of exact answers by task, and `mean`."""
        return measure.accuracy(self.forward.logits(self.live.variables, rows), rows, NAMES)


def fit(config: TrainConfig) -> Fitted:
    """Trains and opens the run again, as any later command would."""
    from mor_jax.training.loop import train

    result = train(config)
    live = open_run(config.output_dir, mesh="data=1", kept=STORED)  # so that merges are measured as they are exported
    return Fitted(
        live=live,
        forward=measure.Forward(live.config, live.plan),
        trainable_parameters=result["trainable_parameters"],
        step_seconds=result["step_seconds"],
    )


def measure_routing(fitted: Fitted, rows: measure.Batch, seed: int, picture: Path | None = None) -> dict[str, float]:
    """Which experts the tasks use while they answer, against shuffled task labels; drawn where `picture` is given."""
    from mor_jax.report.plots import plot_routing

    gates = fitted.forward.row_gates(fitted.live.variables, rows)
    figures, by_task, control = measure.expert_use(gates, rows["task_ids"][:, 0], len(NAMES), seed)
    if picture is not None:
        shown = {"learned": _by_site(by_task), "shuffled labels": _by_site(control)}
        plot_routing(shown, NAMES, picture, "Mean gate of each expert while answering, held-out strings, all layers")
    return figures


def _by_site(gates: measure.Gates) -> dict[str, np.ndarray]:
    """The mean over layers, under the module's own name."""
    return {path.rpartition("/")[2]: own.mean(1) for path, own in gates.items()}


def measure_merges(
    fitted: Fitted, plain: measure.Forward, parts: Mapping[str, Part]
) -> tuple[dict[str, dict[str, Any]], dict, FidelityReport]:
    """Every merge against the routed model on held-out rows: figures by name; the default's parameters and its report.

    The default has the smallest KL on the validation rows; a merge for one task is for that task, never the default.
    """
    live, rows = fitted.live, parts["held_out"].rows
    model, call = make_model(live.config), functools.partial(language_model_call, num_tasks=len(NAMES))
    leaves, plan = live.leaves, live.plan
    assert leaves is not None
    assert plan is not None
    own = (model, live.params, leaves, plan)
    pieces = [{name: value[n::PIECES] for name, value in parts["calibration"].rows.items()} for n in range(PIECES)]

    def merged_by(name: str) -> dict:
        if name in ("least_squares", "sequential"):
            found = least_squares(*own, pieces, call=call, sequential=name == "sequential")
            return merge_changes(*own[1:], found.changes)
        task = NAMES.index(name.removeprefix("task:")) if name != "mean" else None
        return merge(*own[1:], mean_gates(*own, pieces, call=call, task=task))

    def compare(merged: dict, batch: measure.Batch, name: str) -> FidelityReport:
        return measure_fidelity(*own, merged, [batch], call=call, method=name, sites=False)

    figures, candidates, default = {}, {}, None
    for name in ("mean", *(f"task:{task}" for task in NAMES), "least_squares", "sequential"):
        merged = merged_by(name)
        by_task = measure.accuracy(plain.logits({"params": merged}, rows), rows, NAMES)
        report = compare(merged, rows, name)
        figures[name] = {"kl": report.kl, "accuracy": by_task.pop("mean"), "accuracy_by_task": by_task}
        if not name.startswith("task:"):
            candidates[name] = compare(merged, parts["validation"].rows, name).kl
            if default is None or candidates[name] < candidates[default[1].method]:
                default = merged, report
    assert default is not None
    return figures, default[0], dataclasses.replace(default[1], candidates=candidates)


def run_demo(output_dir: str, seed: int = 0) -> dict[str, Any]:
    """Fine-tunes, measures, merges, exports and verifies the embedded example.

    Args:
      output_dir: gets `summary.json`, `curves.png`, `routing.png`, `data/`, `runs/METHOD/` and `export/`.
      seed: of data, data order and initial adapters.

    Returns:
      What `summary.json` holds: `methods` {name: `trainable_parameters`, `accuracy` by task and `mean`,
      `step_seconds`}, `merges` {name: `kl`, `accuracy`}, `export_verified` and more.

    Raises:
      UsageError: `output_dir` exists and is not empty.
    """
    from mor_jax.cli.merge import check_output
    from mor_jax.report.plots import plot_curves

    started, folder = time.monotonic(), check_output(output_dir)
    parts = prepare(folder / "data", seed)
    rows, base = parts["held_out"].rows, open_model(BASE, mesh="data=1")
    plain = measure.Forward(base.config)
    summary: dict[str, Any] = {
        "base_accuracy": measure.accuracy(plain.logits(base.variables, rows), rows, NAMES),
        "methods": {},
    }
    runs = {name: folder / "runs" / name for name in METHODS}
    for name, run in runs.items():
        fitted = fit(make_config(name, parts["train"], run, seed))
        summary["methods"][name] = {
            "trainable_parameters": fitted.trainable_parameters,
            "accuracy": fitted.accuracy(rows),
            "step_seconds": fitted.step_seconds,
            "learning_rate": LEARNING_RATES[name],
        }
    plot_curves({name: run / "metrics.jsonl" for name, run in runs.items()}, folder / "curves.png")
    summary["routing"] = measure_routing(fitted, rows, seed, folder / "routing.png")
    summary["merges"], merged, report = measure_merges(fitted, plain, parts)
    summary |= {"default_merge": report.method} | export(merged, report, fitted.live, folder / "export")
    summary |= {"seed": seed, "seconds": round(time.monotonic() - started, 1), "output_dir": str(folder)}
    beside = folder / ".summary.partial.json"
    beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / "summary.json")
    return summary


def export(merged: dict, report: FidelityReport, live: LiveModel, directory: Path) -> dict[str, Any]:
    """Writes the merged model as a Hugging Face directory and compares it with the one in memory."""
    from mor_jax.cli.merge import write_merged
    from mor_jax.export import verify_export

    write_merged(merged, live, directory, report)
    found = verify_export(directory, merged, live.config)
    return {
        "export_verified": found.verified,
        "export_verified_with": found.reader,
        "export_max_logit_difference": found.max_logit_difference,
    }
