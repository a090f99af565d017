"""Table of training steps compiled ahead of time for TPU slices that are not there, MoR beside LoRA.

Each row is what `mor plan` says: the compiler's memory of one device, collectives of the partitioned program, and a
roofline estimate of the step's time, which is no measurement. Needs the extra `tpu`, whose compiler runs on a CPU.

python experiments/benchmark/slices.py --cases 8b                # minutes a row
python experiments/benchmark/slices.py --cases 70b --methods mor
python experiments/benchmark/slices.py --cases ""                # the tables again, from the rows that there are

Writes experiments/results/slices.json and slices.md after every row; rows measured before stay. A row names the commit
that it was compiled from, with a + where files beside the results had changed since.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import slice_targets

from mor_jax.training.topology import load_topology, prepare_environment

METHODS = ("mor", "lora")
REMATS = ("none", "dots", "offload", "full")
RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30


class Case(NamedTuple):
    """A model on a slice, the rows of a step over all its chips, what is recomputed, and the methods compared."""

    model: str
    topology: str
    rows: int
    remat: str = "full"
    methods: tuple[str, ...] = METHODS


CASES = {
    "8b": Case("Llama-3.1-8B", "v5e:4x4", 48),
    "8b-64": Case("Llama-3.1-8B", "v5e:8x8", 192),
    "70b": Case("Llama-3.1-70B", "v5e:16x16", 256),
    "70b-v5p": Case("Llama-3.1-70B", "v5p:4x4x4", 256),
    "405b": Case("Llama-3.1-405B", "v5p:8x8x8", 1024),
    **{f"8b-{remat}": Case("Llama-3.1-8B", "v5e:4x4", 16, remat, ("mor",)) for remat in REMATS},
}
LENGTH = 4096
NOTE = f"""Rows of {LENGTH} tokens, bfloat16 base over `fsdp`, all linear maps adapted by the methods' defaults. Memory
is the compiler's, which counts gaps between buffers twice. Step times are roofline estimates, not measurements: the
highest of three roofs. Attention is the splash kernel, whose operations are counted as if it skipped no block. The
compiler's seconds are of one core; the share of the base is that of adapters, their gradients and moments over all
chips. MFU is the estimate's: 4 N operations a token (forward, and backward to the activations), by the chips' peak and
the estimated seconds."""
OLDER = """Rows without a commit were compiled when a program that reads one layer of a stack in each turn of a loop was
at times taken to read all of it: their memory roof is up to twice too high. It is the highest roof of none."""


def plan_words(case: str, method: str) -> str:
    """The command that plans the row."""
    model, topology, rows, remat, _ = CASES[case]
    words = f"--topology {topology} --batch-size {rows} --sequence-length {LENGTH} --remat {remat}"
    return f"mor plan {model} --method {method} {words}"


def measure(case: str, method: str) -> dict:
    """One row; run in a process of its own, since a slice is chosen before jax starts."""
    model, topology, rows, remat, _ = CASES[case]
    prepare_environment(topology)
    from mor_jax.models import known_config
    from mor_jax.training.config import TrainConfig
    from mor_jax.training.mesh import make_mesh
    from mor_jax.training.plan import forecast, lay_out

    config = TrainConfig(method=method, batch_size=rows, sequence_length=LENGTH, remat=remat, dtype="bfloat16")
    shape = dataclasses.replace(known_config(model), dtype="bfloat16", param_dtype="bfloat16")
    chips = load_topology(topology)
    run = lay_out(config, shape, make_mesh("fsdp=-1", chips.devices))
    start = time.process_time()
    found = dataclasses.asdict(forecast(config, shape, chips))
    row = {"case": case, "model": model, "method": method, "rows": rows, "length": LENGTH, "commit": _commit()}
    costs = {"compile_cpu_seconds": round(time.process_time() - start, 1)}
    trained = _bytes((run.state.adapters, run.state.adapters, run.state.opt_state))
    shares = {"trained_bytes": trained, "base_bytes": _bytes(run.params)}
    return row | {"command": plan_words(case, method)} | found | costs | shares


def _bytes(tree: object) -> int:
    import jax

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _commit() -> str:
    """Of the source that runs, short; "" where it is no git checkout."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = ask("status", "--porcelain", "--", ":/mor_jax", ":/experiments/benchmark")
    return ask("rev-parse", "--short=7", "HEAD") + "+" * bool(changed)


def table(rows: list[dict]) -> str:
    """The rows as Markdown; those not run say so."""
    heads = (
        "model",
        "slice",
        "method",
        "rows a chip",
        "remat",
        "peak, GiB",
        "of",
        "arguments",
        "estimated s",
        "roofs: compute, memory, network",
        "MFU",
        "collectives, GiB a step",
        "whole stacks gathered",
        "share of the base",
        "compiler, s",
        "commit",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    known = {(row["case"], row["method"]): row for row in rows}
    for case, (model, topology, count, remat, methods) in CASES.items():
        for method in methods:
            ways = count / math.prod(map(int, topology.split(":")[1].split("x")))
            start = [model, topology, method, f"{ways:g}", remat]
            missing = ["not yet run"] + [""] * (len(heads) - len(start) - 1)
            cells = _cells(known[case, method]) if (case, method) in known else missing
            lines.append("| " + " | ".join([*start, *cells]) + " |")
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    roofs = [row[f"{name}_seconds"] for name in ("compute", "memory", "network")]
    moved = [f"{kind} {own['bytes'] / GIB:.1f}" for kind, own in sorted(row["collectives"].items())]
    return [
        f"{row['peak_bytes_per_device'] / GIB:.2f}" + ("" if row["fits"] else ", does not fit"),
        f"{row['capacity_bytes'] / GIB:.0f}",
        f"{row['argument_bytes'] / GIB:.2f}",
        *(["-", "-"] if roofs[0] is None else [f"{max(roofs):.2f}", ", ".join(f"{roof:.2f}" for roof in roofs)]),
        f"{row['mfu']:.0%}" if row.get("mfu") else "-",
        ", ".join(moved),
        ", ".join(row["gathered_stacks"]) or "none",
        f"{row['trained_bytes'] / row['base_bytes']:.2%}",
        f"{row['compile_cpu_seconds']:.0f}",
        row.get("commit", ""),
    ]


def write(rows: list[dict]) -> None:
    """Both files of the results."""
    order = list(CASES)
    rows.sort(key=lambda row: (order.index(row["case"]), METHODS.index(row["method"])))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no TPU"
    command = "python experiments/benchmark/slices.py --cases CASES --methods METHODS"
    document = {"command": command, "machine": machine, "versions": versions, "rows": rows}
    (RESULTS / "slices.json").write_text(json.dumps(document, indent=1) + "\n")
    numbers = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"# Steps compiled for slices that are not there\n\n`{command}` on {machine}; {numbers}.\n\n{NOTE}\n"
    commands = "\n".join(f"    {row['command']}" for row in rows)
    older = [] if all(row.get("commit") for row in rows) else [OLDER]
    parts = [head, *older, slice_targets.table(rows), table(rows), f"The same rows one by one:\n\n{commands}"]
    (RESULTS / "slices.md").write_text("\n\n".join(part.rstrip() for part in parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="8b", help=f"of {', '.join(CASES)}")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="rows compiled at a time, a few GB and one core each")
    parser.add_argument("--row", nargs=2, metavar=("CASE", "METHOD"), help="print one row as JSON and stop")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*args.row)))
        return
    path = RESULTS / "slices.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    cases, methods = list(filter(None, args.cases.split(","))), args.methods.split(",")
    wanted = [(case, method) for case in cases for method in CASES[case].methods if method in methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        for own, found in zip(wanted, pool.map(_measure_apart, wanted), strict=True):
            rows = [row for row in rows if (row["case"], row["method"]) != own] + [found]
            write(rows)
    write(rows)


def _measure_apart(own: tuple[str, str]) -> dict:
    """`measure` in a process of its own."""
    output = subprocess.run([sys.executable, __file__, "--row", *own], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
