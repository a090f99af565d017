"""MiniLM as a classifier on two GLUE tasks: the untuned base, LoRA, LoRA of MoR's total rank, MoR at LoRA's size.

    python experiments/compare/glue.py --model MINILM_DIR --data DATA_DIR --output experiments/results/glue

A fresh classifier is trained with the adapter, the encoder itself stays frozen; the base is the same encoder with the
same fresh classifier before the first step, so also the largest class is shown. Every method trains on the same rows
with its better learning rate of `GRID`, by accuracy on rows that are in neither training nor test (seed 0). What is
finished is kept in `--kept`, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cells
import jax
import tables

from mor_jax.cli.evaluate import evaluate_command
from mor_jax.cli.options import EvalOptions
from mor_jax.training.config import TrainConfig
from mor_jax.training.loop import train

METHODS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"method": "lora", "rank": 8, "alpha": 16.0},
    "LoRA of the total rank": {"method": "lora", "rank": 16, "alpha": 32.0},
    "MoR": {"method": "mor", "rank": 4, "alpha": 8.0, "num_experts": 4},
}
GRID = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
SETTINGS: Mapping[str, Any] = {"objective": "classification", "steps": 100, "batch_size": 16, "warmup_steps": 10}
TASKS: Mapping[str, dict[str, Any]] = {
    "sst2": {"sequence_length": 48, "files": ("sst2/train.jsonl", "sst2/test.jsonl")},
    "mrpc": {"sequence_length": 80, "files": ("mrpc/train.jsonl", "mrpc/test.jsonl")},
}
PARTS = {"train": 2400, "validation": 200, "test": 500}


def write_parts(folder: Path, data: Path, task: str) -> dict[str, Path]:
    """The task's training, validation and test rows, shuffled once with a fixed seed."""
    first, last = (
        [line for line in (data / "glue" / file).read_text(encoding="utf-8").splitlines() if line]
        for file in TASKS[task]["files"]
    )
    random.Random(0).shuffle(first)
    random.Random(0).shuffle(last)
    end = PARTS["train"] + PARTS["validation"]
    found = {"train": first[: PARTS["train"]], "validation": first[PARTS["train"] : end], "test": last[: PARTS["test"]]}
    paths = {}
    for part, lines in found.items():
        paths[part] = folder / f"{task}-{part}.jsonl"
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        paths[part].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


class Comparison:
    """The cells of the table."""

    def __init__(self, model: str, data: Path, kept: Path):
        self._model, self._kept = model, kept
        self.files = {task: write_parts(kept / "data", data, task) for task in TASKS}
        self.settings = {
            **SETTINGS,
            "sequence_length": {task: options["sequence_length"] for task, options in TASKS.items()},
            "methods": {name: dict(options) for name, options in METHODS.items()},
            "rows": PARTS,
        }
        self._cells = cells.Cells(kept / "cells", self.settings)

    def majority(self, task: str) -> float:
        """Share of the largest class among the test rows."""
        lines = self.files[task]["test"].read_text(encoding="utf-8").splitlines()
        counts = collections.Counter(json.loads(line)["label"] for line in lines)
        return max(counts.values()) / len(lines)

    def run(self, task: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """`accuracy`, `validation_accuracy` and `trainable_parameters` after `steps` steps."""
        slug = method.lower().replace(" ", "_")
        folder = self._kept / f"{task}-{slug}-{rate:g}-{seed}-{steps}"

        def make() -> dict[str, Any]:
            config = TrainConfig(
                model=self._model,
                data=(str(self.files[task]["train"]),),
                output_dir=str(folder),
                sequence_length=TASKS[task]["sequence_length"],
                learning_rate=rate,
                seed=seed,
                save_every=50,
                log_every=50,
                resume=folder.exists(),
                compile_cache=str(self._kept / "compiled"),
                **{**SETTINGS, "steps": steps},
                **METHODS[method],
            )
            result = train(config)
            return {
                "accuracy": self._accuracy(folder, task, "test"),
                "validation_accuracy": self._accuracy(folder, task, "validation"),
                "trainable_parameters": result["trainable_parameters"],
            }

        return self._cells.get(folder.name, make)

    def _accuracy(self, run: Path, task: str, part: str) -> float:
        options = EvalOptions(
            model=str(run),
            data=str(self.files[task][part]),
            task="classification",
            batch_size=50,
            sequence_length=TASKS[task]["sequence_length"],
        )
        return evaluate_command(options)["metrics"]["accuracy"]

    def base(self, task: str, seed: int) -> float:
        """Accuracy of the encoder with its fresh classifier: one step at a learning rate that changes nothing."""
        return self.run(task, "LoRA", 1e-30, seed, 1)["accuracy"]

    def tuned(self, task: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """As `run`, after all steps."""
        return self.run(task, method, rate, seed, SETTINGS["steps"])

    def best_rate(self, task: str, method: str) -> float:
        """Of `GRID`, by validation accuracy with the first seed."""
        return max(GRID, key=lambda rate: self.tuned(task, method, rate, SEEDS[0])["validation_accuracy"])


def table(found: Comparison) -> tuple[list[str], dict[str, Any]]:
    """Markdown, and the same as data."""
    lines = [
        f"Accuracy on {PARTS['test']} held-out rows in %, mean ± standard deviation over {len(SEEDS)} seeds.",
        "",
        "| task | largest class | base | " + " | ".join(METHODS) + " | MoR less LoRA | MoR against LoRA |",
        "|---|---|---|" + "---|" * (len(METHODS) + 2),
    ]
    data: dict[str, Any] = {"runs": {}, "learning_rates": {}, "base": {}}
    for task in TASKS:
        rates = {method: found.best_rate(task, method) for method in METHODS}
        runs = {m: [found.tuned(task, m, rate, seed) for seed in SEEDS] for m, rate in rates.items()}
        base = [found.base(task, seed) for seed in SEEDS]
        own = {m: [run["accuracy"] for run in each] for m, each in runs.items()}
        paired = [mor - lora for mor, lora in zip(own["MoR"], own["LoRA"], strict=True)]
        figures = [tables.mean_and_deviation(values) for values in (base, *own.values(), paired)]
        lines.append(
            f"| {task} | {tables.percent(found.majority(task))} | {' | '.join(figures)} | {tables.verdict(paired)} |"
        )
        data["runs"][task], data["learning_rates"][task], data["base"][task] = runs, rates, base
    lines += [
        "",
        "| method | trained parameters, classifier included | " + " | ".join(f"rate, {t}" for t in TASKS) + " |",
    ]
    lines += ["|---|---|" + "---|" * len(TASKS)]
    for method in METHODS:
        size = data["runs"]["sst2"][method][0]["trainable_parameters"]
        rates = " | ".join(f"{data['learning_rates'][task][method]:g}" for task in TASKS)
        lines.append(f"| {method} | {size:,} | {rates} |")
    return lines, data


def main() -> None:
    """Makes the cells that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of all-MiniLM-L6-v2, or another encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/TASK/{train,test}.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="table without its suffix")
    parser.add_argument("--kept", type=Path, default=Path("runs/glue"), help="finished parts are kept here")
    arguments = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(arguments.kept / "compiled"))
    found = Comparison(arguments.model, arguments.data, arguments.kept)
    lines, data = table(found)
    command = f"python experiments/compare/glue.py --model MINILM_DIR --data DATA_DIR --output {arguments.output}"
    tables.write(arguments.output, "MiniLM on two GLUE tasks", command, found.settings, lines, data)


if __name__ == "__main__":
    main()
