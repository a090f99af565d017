"""MiniLM as a classifier on two GLUE tasks: the untuned base, LoRA, LoRA of MoR's total rank, MoR at LoRA's size.

    python experiments/compare/glue.py --model MINILM_DIR --data DATA_DIR --output experiments/results/glue

A fresh classifier is trained with the adapter, the encoder itself stays frozen; the base is the same encoder with the
same fresh classifier before the first step, so also the largest class is shown. Every method trains on the same rows
with the same learning rate. What is finished is kept in `--kept`, so the command can be stopped and repeated.
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
from variants import METHODS, slug

from mor_jax.cli.evaluate import evaluate_command
from mor_jax.cli.options import EvalOptions
from mor_jax.training.config import TrainConfig
from mor_jax.training.loop import train

LEARNING_RATE = 1e-3
SEEDS = (0, 1, 2)
SETTINGS: Mapping[str, Any] = {"objective": "classification", "steps": 300, "batch_size": 8, "warmup_steps": 30}
TASKS: Mapping[str, dict[str, Any]] = {
    "sst2": {"sequence_length": 48, "files": ("sst2/train.jsonl", "sst2/test.jsonl")},
    "mrpc": {"sequence_length": 80, "files": ("mrpc/train.jsonl", "mrpc/test.jsonl")},
}
PARTS = {"train": 2400, "test": 500}


def write_parts(folder: Path, data: Path, task: str) -> dict[str, Path]:
    """The task's training and test rows, each shuffled once with a fixed seed and cut to `PARTS`."""
    paths = {}
    for (part, size), file in zip(PARTS.items(), TASKS[task]["files"], strict=True):
        lines = [line for line in (data / "glue" / file).read_text(encoding="utf-8").splitlines() if line]
        random.Random(0).shuffle(lines)
        paths[part] = folder / f"{task}-{part}.jsonl"
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        paths[part].write_text("\n".join(lines[:size]) + "\n", encoding="utf-8")
    return paths


class Comparison:
    """The cells of the table."""

    def __init__(self, model: str, data: Path, kept: Path):
        self._model, self._kept = model, kept
        self.files = {task: write_parts(kept / "data", data, task) for task in TASKS}
        self.settings = {
            **SETTINGS,
            "learning_rate": LEARNING_RATE,
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

    def run(self, task: str, method: str, seed: int, tuned: bool = True) -> dict[str, Any]:
        """`accuracy` and `trainable_parameters` of a run; not `tuned`: after one step that changes nothing."""
        folder = self._kept / f"{task}-{slug(method) if tuned else 'base'}-{seed}"

        def make() -> dict[str, Any]:
            config = TrainConfig(
                model=self._model,
                data=(str(self.files[task]["train"]),),
                output_dir=str(folder),
                sequence_length=TASKS[task]["sequence_length"],
                learning_rate=LEARNING_RATE if tuned else 1e-30,
                seed=seed,
                save_every=50,
                log_every=50,
                resume=folder.exists(),
                compile_cache=str(self._kept / "compiled"),
                **(SETTINGS if tuned else {**SETTINGS, "steps": 1, "warmup_steps": 0}),
                **METHODS[method],
            )
            result = train(config)
            options = EvalOptions(
                model=str(folder),
                data=(str(self.files[task]["test"]),),
                task="classification",
                batch_size=50,
                sequence_length=TASKS[task]["sequence_length"],
            )
            accuracy = evaluate_command(options)["metrics"]["accuracy"]
            return {"accuracy": accuracy, "trainable_parameters": result["trainable_parameters"]}

        return self._cells.get(folder.name, make)


def table(found: Comparison) -> tuple[list[str], dict[str, Any]]:
    """Markdown, and the same as data."""
    lines = [
        f"Accuracy on {PARTS['test']} held-out rows in %, mean ± standard deviation over {len(SEEDS)} seeds.",
        "",
        "| task | largest class | base | " + " | ".join(METHODS) + " | MoR less LoRA | MoR against LoRA |",
        "|---|---|---|" + "---|" * (len(METHODS) + 2),
    ]
    data: dict[str, Any] = {"runs": {}, "base": {}}
    for task in TASKS:
        runs = {method: [found.run(task, method, seed) for seed in SEEDS] for method in METHODS}
        base = [found.run(task, "LoRA", seed, tuned=False)["accuracy"] for seed in SEEDS]
        own = {m: [run["accuracy"] for run in each] for m, each in runs.items()}
        paired = [mor - lora for mor, lora in zip(own["MoR"], own["LoRA"], strict=True)]
        figures = [tables.mean_and_deviation(values) for values in (base, *own.values(), paired)]
        lines.append(
            f"| {task} | {tables.percent(found.majority(task))} | {' | '.join(figures)} | {tables.verdict(paired)} |"
        )
        data["runs"][task], data["base"][task] = runs, base
    sizes = {method: data["runs"]["sst2"][method][0]["trainable_parameters"] for method in METHODS}
    lines += ["", "Trained parameters, classifier included: " + ", ".join(f"{m} {n:,}" for m, n in sizes.items()) + "."]
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
