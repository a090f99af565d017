"""The demo from data to summary: LoRA and MoR at equal size, expert use, merges, export, all in one folder."""

from __future__ import annotations

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
from mor_jax.cli.opening import LiveModel, load_tokenizer, open_model, open_run
from mor_jax.training.config import TrainConfig

BASE = Path(__file__).parent / "base"
METHODS: Mapping[str, Mapping[str, Any]] = {  # equal to 2 % in trained parameters; alpha / rank is 2 for both
    "lora": {"rank": 12, "alpha": 24.0},
    "mor": {"rank": 8, "alpha": 16.0, "num_experts": 4},
}
LEARNING_RATES: Mapping[str, float] = {"lora": 1e-2, "mor": 1e-2}  # from experiments/results/demo_grid.md
STEPS = 300
STRINGS = {"train": 1000, "validation": 100, "held_out": 100}  # each is asked in every task
NAMES = tuple(TASKS)


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
    live = open_run(config.output_dir)
    return Fitted(
        live=live,
        forward=measure.Forward(live.config, live.plan),
        trainable_parameters=result["trainable_parameters"],
        step_seconds=step_seconds(Path(config.output_dir) / "metrics.jsonl"),
    )


def step_seconds(metrics: Path) -> float:
    """Mean seconds of a step after the second, from the tokens of the steps and the last line's tokens a second."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rate = lines[-1]["tokens_per_second"]
    return float(np.mean([line["tokens"] for line in lines[2:]]) / rate) if rate else 0.0


def measure_routing(fitted: Fitted, rows: measure.Batch, seed: int, picture: Path | None = None) -> dict[str, float]:
    """Which experts the tasks use while they answer, against shuffled task labels; drawn where `picture` is given."""
    from mor_jax.report.plots import plot_routing

    gates = fitted.forward.row_gates(fitted.live.variables, rows, answers=True)
    figures, by_task, control = measure.expert_use(gates, rows["task_ids"][:, 0], len(NAMES), seed)
    if picture is not None:
        shown = {"learned": _by_site(by_task), "shuffled labels": _by_site(control)}
        plot_routing(shown, NAMES, picture, "Mean gate of each expert while answering, held-out strings, all layers")
    return figures


def _by_site(gates: measure.Gates) -> dict[str, np.ndarray]:
    """The mean over layers, under the module's own name."""
    return {path.rpartition("/")[2]: own.mean(1) for path, own in gates.items()}


def measure_merges(
    fitted: Fitted, base: measure.Forward, parts: Mapping[str, Part]
) -> tuple[dict[str, dict[str, Any]], str, dict]:
    """Every merge against the routed model on held-out rows: (figures by name, the default's name, its parameters).

    The default has the smallest KL on the validation rows; a merge for one task is for that task, never the default.
    """
    live, figures, validation = fitted.live, {}, {}
    calibration, rows, choosing = (parts[name].rows for name in ("calibration", "held_out", "validation"))
    gates = fitted.forward.row_gates(live.variables, calibration, answers=False)
    merged = measure.merged_variables(live, calibration, gates, NAMES)
    routed, routed_choosing = (fitted.forward.logits(live.variables, batch) for batch in (rows, choosing))
    for name, params in merged.items():
        logits = base.logits({"params": params}, rows)
        by_task = measure.accuracy(logits, rows, NAMES)
        figures[name] = {
            "kl": measure.divergence(routed, logits, rows),
            "accuracy": by_task.pop("mean"),
            "accuracy_by_task": by_task,
        }
        if not name.startswith("task:"):
            logits = base.logits({"params": params}, choosing)
            validation[name] = measure.divergence(routed_choosing, logits, choosing)
    chosen = min(validation, key=lambda name: validation[name])
    return figures, chosen, merged[chosen]


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
    rows, base = parts["held_out"].rows, open_model(BASE)
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
    summary["merges"], summary["default_merge"], merged = measure_merges(fitted, plain, parts)
    summary |= export(merged, fitted.live, folder / "export")
    summary |= {"seed": seed, "seconds": round(time.monotonic() - started, 1), "output_dir": str(folder)}
    beside = folder / ".summary.partial.json"
    beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / "summary.json")
    return summary


def export(merged: dict, live: LiveModel, directory: Path) -> dict[str, Any]:
    """Writes the merged model as a Hugging Face directory and compares it with the one in memory."""
    from mor_jax.export import export_hf, verify_export

    export_hf(merged, live.config, directory, source_dir=live.directory)
    found = verify_export(directory, merged, live.config)
    return {
        "export_verified": found.verified,
        "export_verified_with": found.reader,
        "export_max_logit_difference": found.max_logit_difference,
    }
