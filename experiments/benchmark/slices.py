"""Table of training steps compiled ahead of time for TPU slices that are not there, MoR beside LoRA.

Each row is what `mor plan` says: the compiler's memory of one device, collectives of the partitioned program, and a
roofline estimate of the step's time, which is no measurement. Needs the extra `tpu`, whose compiler runs on a CPU.

python experiments/benchmark/slices.py --cases 8b                # minutes a row
python experiments/benchmark/slices.py --cases 8b,70b,405b

Writes experiments/results/slices.json and slices.md; rows of other cases in the files stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from mor_jax.training.topology import load_topology, prepare_environment

RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30
# name: (model, slice, rows of a step)
CASES = {
    "8b": ("Llama-3.1-8B", "v5e:4x4", 48),
    "70b": ("Llama-3.1-70B", "v5e:16x16", 256),
    "70b-v5p": ("Llama-3.1-70B", "v5p:4x4x4", 256),
    "405b": ("Llama-3.1-405B", "v5p:8x8x8", 1024),
}
METHODS = ("lora", "mor")
LENGTH = 4096
NOTE = f"""Rows of {LENGTH} tokens, bfloat16 base, full rematerialisation, all linear maps adapted with the methods'
defaults, base over `fsdp`. Memory is the compiler's. Step times are roofline estimates, not measurements: the highest
of three roofs. Attention is the splash kernel, whose operations are counted as if it skipped no block."""


def measure(case: str, method: str) -> dict:
    """One row; run in a process of its own, since a slice is chosen before jax starts."""
    model, slice_name, rows = CASES[case]
    prepare_environment(slice_name)
    from mor_jax.models import known_config
    from mor_jax.training.config import TrainConfig
    from mor_jax.training.plan import forecast

    config = TrainConfig(method=method, batch_size=rows, sequence_length=LENGTH, remat="full", dtype="bfloat16")
    shape = dataclasses.replace(known_config(model), dtype="bfloat16", param_dtype="bfloat16")
    start = time.time()
    found = dataclasses.asdict(forecast(config, shape, load_topology(slice_name)))
    return (
        {"case": case, "model": model, "method": method, "rows": rows, "length": LENGTH}
        | found
        | {"compile_seconds": round(time.time() - start, 1)}
    )


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | slice | method | rows a chip | peak, GiB | of | arguments | estimated s | roofs: compute, memory, "
        "network | all-gather, GiB | whole stacks gathered |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        chips = 1
        for part in row["mesh"].split(","):
            chips *= int(part.split("=")[1])
        roofs = [row[f"{name}_seconds"] for name in ("compute", "memory", "network")]
        cells = [
            row["model"],
            row["topology"],
            row["method"],
            f"{row['rows'] / chips:g}",
            f"{row['peak_bytes_per_device'] / GIB:.2f}" if row["fits"] else "does not fit",
            f"{row['capacity_bytes'] / GIB:.0f}",
            f"{row['argument_bytes'] / GIB:.2f}",
            *(["-", "-"] if roofs[0] is None else [f"{max(roofs):.2f}", ", ".join(f"{roof:.2f}" for roof in roofs)]),
            f"{row['collectives'].get('all-gather', {}).get('bytes', 0) / GIB:.0f}",
            ", ".join(row["gathered_stacks"]) or "none",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="8b", help=f"of {', '.join(CASES)}")
    parser.add_argument("--row", nargs=2, metavar=("CASE", "METHOD"), help="print one row as JSON and stop")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*args.row)))
        return
    path, cases = RESULTS / "slices.json", args.cases.split(",")
    kept = [row for row in json.loads(path.read_text())["rows"] if row["case"] not in cases] if path.exists() else []
    for case in cases:
        for method in METHODS:
            command = [sys.executable, __file__, "--row", case, method]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            kept.append(json.loads(output.splitlines()[-1]))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no TPU"
    command = f"python experiments/benchmark/slices.py --cases {','.join(dict.fromkeys(row['case'] for row in kept))}"
    document = {"command": command, "machine": machine, "versions": versions, "rows": kept}
    path.write_text(json.dumps(document, indent=1) + "\n")
    numbers = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"# Steps compiled for slices that are not there\n\n`{command}` on {machine}; {numbers}.\n\n{NOTE}\n\n"
    (RESULTS / "slices.md").write_text(head + table(kept) + "\n")


if __name__ == "__main__":
    main()
