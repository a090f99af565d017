"""One adapter for six tasks on a real model: the untuned base, LoRA, LoRA of MoR's total rank, MoR at LoRA's size.

    python experiments/compare/multitask.py --model SMOLLM2_DIR --data DATA_DIR --output experiments/results/multitask

Every method trains on the same rows; LoRA and MoR with the learning rate of `GRID` that has the lowest validation loss
(seed 0), LoRA of the total rank with LoRA's, as alpha / rank is the same.
Figures are of held-out rows: accuracy of the likeliest option where a task has options (also for the base, which then
needs no knowledge of the format), exact match of greedy text where it has none. What is finished is kept in `--kept`,
so the command can be stopped and repeated. LoRA, LoRA of the total rank and MoR have one scale alpha / rank = 2.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cells
import jax
import jax.numpy as jnp
import numpy as np
import tables
import tasks
from variants import METHODS, slug

from mor_jax.cli.evaluate import generation_question
from mor_jax.cli.opening import LiveModel, open_model, open_run
from mor_jax.data import Tokenization
from mor_jax.evaluation.generation import exact_match, left_padded
from mor_jax.models import init_cache
from mor_jax.training.config import TrainConfig
from mor_jax.training.loop import train

GRID = (2e-3, 4e-3)
SEEDS: Mapping[str, tuple[int, ...]] = {"LoRA": (0, 1, 2), "LoRA of the total rank": (0, 1, 2), "MoR": (0, 1, 2)}
SETTINGS: Mapping[str, Any] = {
    "steps": 240,
    "batch_size": 2,
    "sequence_length": 168,
    "overlong": "drop",
    "warmup_steps": 12,
}
ROWS = 10  # prompts scored at once


class OptionScorer:
    """Log-likelihood of each option after a prompt, the prompt computed once for all of them."""

    def __init__(self, live: LiveModel):
        self._live = live
        self._scores = jax.jit(self._run)

    def _run(self, variables: Any, prompts: jax.Array, mask: jax.Array, options: jax.Array) -> jax.Array:
        """Prompts and mask (B, S), text at the right end; options (O, L), -1 after their end -> (B, O)."""
        module: Any = self._live.module

        def forward(cache: Any, ids: jax.Array, positions: jax.Array, segments: jax.Array, output: str) -> Any:
            call = {**variables, "cache": cache}
            logits, changed = module.apply(
                call, ids, positions, segments, decode=True, output=output, mutable=["cache"]
            )
            return jax.nn.log_softmax(logits, axis=-1), changed["cache"]

        rows, length = prompts.shape
        empty = init_cache(self._live.config, rows, length + options.shape[1])  # pyright: ignore[reportArgumentType]
        first, cache = forward(empty, prompts, jnp.maximum(jnp.cumsum(mask, 1) - 1, 0), mask, "last")

        def score(option: jax.Array) -> jax.Array:
            real = (option >= 0).astype(jnp.int32)
            ids = jnp.broadcast_to(jnp.maximum(option, 0), (rows, len(option)))
            positions = mask.sum(1)[:, None] + jnp.arange(len(option))
            after, _ = forward(cache, ids, positions, jnp.broadcast_to(real, ids.shape), "logits")
            predicted = jnp.concatenate([first, after[:, :-1]], axis=1)
            return (jnp.take_along_axis(predicted, ids[..., None], -1)[..., 0] * real).sum(1)

        return jax.lax.map(score, options).T

    def accuracy(self, rows: Sequence[tasks.Row], tokenization: Tokenization) -> float:
        """Share of the rows whose right option is the likeliest; the options of all rows are the same."""
        texts = list(rows[0]["options"])
        encoded = [tokenization.encode_behind(rows[0]["prompt"], text) for text in texts]
        width = max(map(len, encoded))
        options = np.array([own + [-1] * (width - len(own)) for own in encoded], np.int32)
        prompts = [generation_question(dict(row), tokenization, "row").prompt for row in rows]
        length = -(-max(map(len, prompts)) // 32) * 32
        right = 0
        for start in range(0, len(rows), ROWS):
            ids, mask = left_padded(prompts[start : start + ROWS], ROWS, length)
            found = np.asarray(self._scores(self._live.variables, ids, mask, options)).argmax(1)
            answers = [texts.index(row["completion"]) for row in rows[start : start + ROWS]]
            right += int((found[: len(answers)] == answers).sum())
        return right / len(rows)


def written_accuracy(live: LiveModel, rows: Sequence[tasks.Row], tokenization: Tokenization) -> float:
    """Exact match of greedy text."""
    ends = tokenization.stop
    questions = [generation_question(dict(row), tokenization, "row") for row in rows]
    run = live.generate_fn(ends, ends[0], max_new_tokens=8)
    decode = lambda ids: tokenization.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    found, _ = exact_match(run, questions, decode, eos_ids=ends, batch_size=ROWS, pad_id=ends[0])
    return found["accuracy"]


def measure(live: LiveModel, parts: Mapping[str, Mapping[str, list[tasks.Row]]]) -> dict[str, float]:
    """Accuracy on the test rows of each task, and their `mean`."""
    tokenization, scorer = live.tokenization(), OptionScorer(live)
    found = {}
    for name, own in parts.items():
        closed = own["test"][0]["options"] is not None
        found[name] = (
            scorer.accuracy(own["test"], tokenization) if closed else written_accuracy(live, own["test"], tokenization)
        )
    return found | {"mean": statistics.mean(found.values())}


class Comparison:
    """The cells of the table, each computed once and kept."""

    def __init__(self, model: str, data: Path, kept: Path):
        self._model, self._kept = model, kept
        self.parts = tasks.write_parts(kept / "data", data)
        self.settings = {
            **SETTINGS,
            "methods": {name: dict(options) for name, options in METHODS.items()},
            "test_rows": {name: len(own["test"]) for name, own in self.parts.items()},
            "rows_crc32": {name: tasks.checksum(own["train"] + own["test"]) for name, own in self.parts.items()},
        }
        self._cells = cells.Cells(kept / "cells", self.settings)

    def majority(self, task: str) -> str:
        """Share of the most frequent answer among the test rows in %, "" for free text."""
        answers = [row["completion"] for row in self.parts[task]["test"]]
        if self.parts[task]["test"][0]["options"] is None:
            return ""
        return tables.percent(max(map(answers.count, answers)) / len(answers))

    def base(self) -> dict[str, Any]:
        """Accuracy of the untuned model."""
        return self._cells.get(
            "base", lambda: {"accuracy": measure(open_model(self._model, mesh="data=1"), self.parts)}
        )

    def tuned(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """`accuracy`, `validation_loss`, `trainable_parameters` and `tokens` of one run."""
        run = self._kept / f"{slug(method)}-{rate:g}-{seed}"

        def make() -> dict[str, Any]:
            files = {
                part: tuple(f"{n}={self._kept}/data/{part}/{n}.jsonl" for n in tasks.TASKS) for part in tasks.PARTS
            }
            config = TrainConfig(
                model=self._model,
                data=files["train"],
                eval_data=files["validation"],
                eval_batches=0,
                output_dir=str(run),
                learning_rate=rate,
                seed=seed,
                save_every=25,
                log_every=25,
                resume=run.exists(),
                compile_cache=str(self._kept / "compiled"),
                **SETTINGS,
                **METHODS[method],
            )
            result = train(config)
            figures = {"trainable_parameters": result["trainable_parameters"], "validation_loss": result["eval_loss"]}
            return {"accuracy": measure(open_run(run, mesh="data=1"), self.parts)} | figures

        return self._cells.get(run.name, make)

    def best_rate(self, method: str) -> float:
        """Of `GRID`, by validation loss with the first seed; LoRA of the total rank takes that of LoRA."""
        method = "LoRA" if method == "LoRA of the total rank" else method
        return min(GRID, key=lambda rate: self.tuned(method, rate, SEEDS[method][0])["validation_loss"])


def table(found: Comparison, rates: Mapping[str, float]) -> tuple[list[str], dict[str, Any]]:
    """Markdown, and the same as data."""
    base = found.base()["accuracy"]
    runs = {m: [found.tuned(m, rate, seed) for seed in SEEDS[m]] for m, rate in rates.items()}
    grid = {m: {rate: found.tuned(m, rate, SEEDS[m][0])["validation_loss"] for rate in GRID} for m in ("LoRA", "MoR")}
    lines = [
        "Accuracy on held-out rows in %, mean ± standard deviation over seeds; exact match for quartz. Seeds: "
        + ", ".join(f"{method} {len(seeds)}" for method, seeds in SEEDS.items())
        + ".",
        "",
        f"| task | from | rows | largest class | base | {' | '.join(METHODS)} | MoR less LoRA | MoR against LoRA |",
        "|---|---|---|---|---|" + "---|" * (len(METHODS) + 2),
    ]
    for name in (*tasks.TASKS, "mean"):
        own = {m: [run["accuracy"][name] for run in each] for m, each in runs.items()}
        paired = [mor - lora for mor, lora in zip(own["MoR"], own["LoRA"], strict=True)]
        suite = tasks.TASKS[name].suite if name in tasks.TASKS else ""
        size = found.settings["test_rows"].get(name, "")
        figures = [tables.mean_and_deviation(values) for values in own.values()]
        verdict = [tables.mean_and_deviation(paired), tables.verdict(paired)]
        largest = found.majority(name) if name in tasks.TASKS else ""
        start = f"| {name} | {suite} | {size} | {largest} | {tables.percent(base[name])}"
        lines.append(f"{start} | {' | '.join(figures + verdict)} |")
    lines += [
        "",
        "| method | trained parameters | learning rate | validation loss at each rate, seed 0 |",
        "|---|---|---|---|",
    ]
    for method, rate in rates.items():
        losses = ", ".join(f"{each:g}: {loss:.4f}" for each, loss in grid.get(method, {}).items())
        lines.append(f"| {method} | {runs[method][0]['trainable_parameters']:,} | {rate:g} | {losses} |")
    rows = SETTINGS["batch_size"] * SETTINGS["steps"]
    lines += [
        "",
        f"A short training: {SETTINGS['steps']} steps, {rows} rows of {SETTINGS['sequence_length']} tokens, two or"
        " three examples each, so that most examples are seen once or never. It teaches the form of the answers and"
        " which are frequent before it teaches a task: no more than that is learned where a figure is not above both"
        " the base and the largest class. A figure on 100 rows has a standard error of up to 5 points, the mean one of"
        " about 2 before any spread between seeds; a verdict on three seeds is weak. Nothing here is about longer"
        " training or larger models.",
    ]
    return lines, {"base": base, "runs": runs, "learning_rates": rates, "validation_losses": grid}


def main() -> None:
    """Makes the cells that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct, or another decoder")
    parser.add_argument("--data", type=Path, required=True, help="data folder, see tasks.py")
    parser.add_argument("--output", type=Path, required=True, help="table without its suffix")
    parser.add_argument("--kept", type=Path, default=Path("runs/multitask"), help="finished parts are kept here")
    arguments = parser.parse_args()
    found = Comparison(arguments.model, arguments.data, arguments.kept)
    jax.config.update("jax_compilation_cache_dir", str(arguments.kept / "compiled"))
    found.base()
    rates = {method: found.best_rate(method) for method in METHODS}
    lines, data = table(found, rates)
    command = f"python experiments/compare/multitask.py --model SMOLLM2_DIR --data DATA_DIR --output {arguments.output}"
    tables.write(
        arguments.output, "One adapter for six tasks, SmolLM2-135M-Instruct", command, found.settings, lines, data
    )


if __name__ == "__main__":
    main()
