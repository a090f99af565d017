"""The demo's learning rates and its table: LoRA against MoR at equal size.

    python experiments/quickstart/compare.py grid  --output experiments/results/demo_grid
    python experiments/quickstart/compare.py seeds --output experiments/results/demo

`grid` trains both methods at each learning rate of one grid and scores them on the validation strings; the best of each
stands in `mor_jax/cli/demo/run.py`. `seeds` is `mor demo` with three seeds (other strings, other order, other initial
adapters), scored on held-out strings that neither training nor the grid has seen. `--seed` runs one of them apart; as
several may share the machine, the table leaves step times to `mor demo` and `benchmark/`. MoR wins or loses where the
mean of the paired differences is over twice its standard error; else it is a tie.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from mor_jax.cli.demo import run

sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))  # the figures and tables of the other comparisons

import tables
from tables import mean_and_deviation, percent, verdict

GRID = (2.5e-3, 5e-3, 1e-2, 2e-2)
SEEDS = (0, 1, 2)


def run_grid(table: Path) -> list[dict[str, Any]]:
    """Validation accuracy of each method at each rate, seed 0; rows of the same settings are taken from `table`."""
    known = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {"settings": {}, "rows": []}
    same = known["settings"] == settings()
    rows = [row for row in known["rows"] if same and row["learning_rate"] in GRID]
    done = {(row["method"], row["learning_rate"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        parts = run.prepare(Path(scratch) / "data", 0)
        for method, rate in itertools.product(run.METHODS, GRID):
            if (method, rate) in done:
                continue
            config = run.make_config(method, parts["train"], Path(scratch) / f"{method}-{rate}", 0, rate)
            accuracy = run.fit(config).accuracy(parts["validation"].rows)
            rows.append({"method": method, "learning_rate": rate, "accuracy": accuracy})
            print(rows[-1], flush=True)
    return rows


def grid_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: rates down, methods across; the best of each method in bold."""
    best = {m: max(r["accuracy"]["mean"] for r in rows if r["method"] == m) for m in run.METHODS}
    found = {(r["learning_rate"], r["method"]): r["accuracy"]["mean"] for r in rows}
    lines = ["| learning rate | " + " | ".join(run.METHODS) + " |", "|---|" + "---|" * len(run.METHODS)]
    for rate in GRID:
        cells = [
            f"**{percent(found[rate, m])}**" if found[rate, m] == best[m] else percent(found[rate, m])
            for m in run.METHODS
        ]
        lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
    return ["Mean exact match over the five tasks on the validation strings, in %:", "", *lines]


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """The summary of `mor demo` with this seed; kept in `folder`, and taken from there if the settings are the same."""
    kept = folder / f"seed-{seed}.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == settings() | {"learning_rates": dict(run.LEARNING_RATES)}:
            return found["summary"]
    with tempfile.TemporaryDirectory() as scratch:
        summary = run.run_demo(str(Path(scratch) / "demo"), seed)
    del summary["output_dir"], summary["seconds"]  # seeds may share the machine
    folder.mkdir(parents=True, exist_ok=True)
    used = settings() | {"learning_rates": dict(run.LEARNING_RATES)}
    kept.write_text(json.dumps({"settings": used, "summary": summary}), encoding="utf-8")
    return summary


def settings() -> dict[str, Any]:
    """What the figures follow from, beside the code, the seed and the learning rates."""
    return {
        "steps": run.STEPS,
        "strings": run.STRINGS,
        "methods": {name: dict(options) for name, options in run.METHODS.items()},
    }


def differences(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """MoR's accuracy less LoRA's, for each task and the mean a value a seed."""
    accuracy = [{m: each["methods"][m]["accuracy"] for m in run.METHODS} for each in found]
    return {name: [a["mor"][name] - a["lora"][name] for a in accuracy] for name in (*run.NAMES, "mean")}


def seeds_table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: accuracy by task, merges, and what routing does."""
    lines = ["## Exact match on held-out strings, in %, mean ± standard deviation over seeds", ""]
    lines += ["| task | base | lora | mor | mor less lora | MoR against LoRA |", "|---|---|---|---|---|---|"]
    for name, paired in differences(found).items():
        base = mean_and_deviation([each["base_accuracy"][name] for each in found])
        cells = [mean_and_deviation([each["methods"][m]["accuracy"][name] for each in found]) for m in run.METHODS]
        lines.append(f"| {name} | {base} | {' | '.join(cells)} | {mean_and_deviation(paired)} | {verdict(paired)} |")
    sizes = {m: found[0]["methods"][m]["trainable_parameters"] for m in run.METHODS}
    lines += ["", "Trained parameters: " + ", ".join(f"{m} {n:,}" for m, n in sizes.items()) + "."]
    lines += [
        "",
        "## Merges of MoR against the routed model",
        "",
        "| merge | KL, nats | exact match, % | on its own task, % |",
        "|---|---|---|---|",
    ]
    for name in found[0]["merges"]:
        kl = [each["merges"][name]["kl"] for each in found]
        right = mean_and_deviation([each["merges"][name]["accuracy"] for each in found])
        task = name.removeprefix("task:")
        own = [each["merges"][name]["accuracy_by_task"].get(task) for each in found]
        shown = mean_and_deviation(own) if task != name else ""
        lines.append(f"| {name} | {statistics.mean(kl):.3f} ± {statistics.stdev(kl):.3f} | {right} | {shown} |")
    lines += ["", "## Expert use while answering, against shuffled task labels", ""]
    lines += ["| seed | spread by task | shuffled, mean | shuffled, largest | p |", "|---|---|---|---|---|"]
    for each in found:
        use = each["routing"]
        cells = [f"{use[key]:.4f}" for key in ("by_task", "shuffled_mean", "shuffled_max")]
        lines.append(f"| {each['seed']} | {' | '.join(cells)} | {use['p_value']:.3f} |")
    lines += ["", "Spread: mean total variation distance of a task's mean gates from the average over tasks."]
    return [*lines, "", routing_verdict(found)]


def routing_verdict(found: list[dict[str, Any]]) -> str:
    """Whether routing does anything, in one sentence: by expert use and by what the mean merge loses."""
    used = all(each["routing"]["by_task"] > each["routing"]["shuffled_max"] for each in found)
    matters = all(each["merges"]["mean"]["kl"] > 0.01 for each in found)
    if used and matters:
        return "With every seed expert use follows the task, and the routed model differs from its own mean merge."
    return "Routing does nothing here: expert use does not follow the task, or the mean merge is the same model."


def main() -> None:
    """Runs one of the two and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "seeds"))
    parser.add_argument("--output", type=Path, required=True, help="table without its suffix")
    parser.add_argument("--seed", type=int, default=None, choices=SEEDS, help="run this seed alone and write no table")
    parser.add_argument("--kept", type=Path, default=Path("runs/demo_seeds"), help="finished seeds are kept here")
    arguments = parser.parse_args()
    command = f"python experiments/quickstart/compare.py {arguments.what} --output {arguments.output}"
    if arguments.what == "grid":
        rows = run_grid(arguments.output.with_suffix(".json"))
        title = "The demo's learning rates"
        tables.write(arguments.output, title, command, settings(), grid_table(rows), {"rows": rows})
    elif arguments.seed is not None:
        print(json.dumps(run_seed(arguments.seed, arguments.kept)))
    else:
        found = [run_seed(seed, arguments.kept) for seed in SEEDS]
        data = {"seeds": found, "verdicts": {name: verdict(paired) for name, paired in differences(found).items()}}
        used = settings() | {"learning_rates": dict(run.LEARNING_RATES)}
        title = "The demo: LoRA and MoR at equal size"
        tables.write(arguments.output, title, command, used, seeds_table(found), data)


if __name__ == "__main__":
    main()
