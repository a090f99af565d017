"""One GPU against what others print and against torch PEFT: the rows G1 to G11 of a table, in under ten minutes.

    python experiments/benchmark/gpu.py
    python experiments/benchmark/gpu.py --rows G1,G3 --budget-seconds 200
    python experiments/benchmark/gpu.py --cache DIR --rows G7,G11     # programs of an earlier run are in DIR
    python experiments/benchmark/gpu.py --list                        # every row with its target, nothing is run
    python experiments/benchmark/gpu.py --shape tiny --output table   # the same programs in small, on any backend

Shape G: Llama-3-8B widths, random bfloat16 weights made on the device, rows of 4,096 tokens, 2 rows a micro-batch, 16
micro-batches a step, LoRA of rank 16 on the seven linear maps. Every adapter's step is made by the ``make_step`` that
``mor train`` calls. Times are wall times that end when the device is done; of two programs they are taken in turn, A,
B, A, B, and the figure is the median of the per-round ratios with its quartiles.

A line is written to the table as soon as it is measured, so a run that is killed loses nothing; a row that fails, is
out of memory or takes too long says so in its note, and the others go on. A row that was measured before keeps its
figure when the time does not suffice. Rows run in the order of ``--rows``; by default the most telling come first.

Row: G1 tokens/s at shape G. G1p ours against PEFT on torch. G1b Qwen2.5-7B. G2 LoRA ÷ full fine-tuning at 1B. G3 LoRA ÷
floor. G4 peak memory ÷ base. G5 quantised base. G6 packed rows. G7 attention. G8 MoR ÷ LoRA. G9 compile time. G10
recomputation. G11 determinism.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_rig import SHAPE_SETS, NotMeasuredError, Rig
from gpu_rows import ROWS, Line
from supervise import End, Job, RunJob, one_line, run_jobs
from table import describe_machine, merge_rows, read_rows, write_table

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


def make_worker(argument: tuple[str, int]) -> RunJob:
    """In the worker: the function that measures a row's lines, one result for each."""
    shape, rounds = argument
    rig = Rig(SHAPE_SETS[shape](), rounds)

    def run(name: str, seconds: float) -> Iterator[dict[str, Any]]:
        lines = [line for line in ROWS[name].lines if line.measure is not None]
        start = time.monotonic()
        for number, line in enumerate(lines, 1):
            rig.until = start + seconds * number / len(lines)
            found = _measure(rig, line)
            yield found if shape == "G" else found | {"note": f"shape {shape}: {found['note']}"}

    return run


def _measure(rig: Rig, line: Line) -> dict[str, Any]:
    assert line.measure is not None
    try:
        found = line.measure(rig)
    except NotMeasuredError as reason:
        found = {"figure": None, "note": str(reason)}
    except Exception as error:  # whatever it is, the other lines go on
        found = {"figure": None, "note": one_line(error)}
        rig.forget()
    return {"what": line.what, **found, "machine": describe_machine()}


def entry(row: str, line: Line, found: dict[str, Any], command: str) -> dict[str, Any]:
    """The line as the table holds it."""
    common = {"id": row, "what": line.what, "must": line.must, "command": command, "machine": {}}
    return common | found | {"note": line.note(found["note"]), "stretch": line.stretch, "reference": line.reference}


def not_yet_run(command: str) -> Iterator[dict[str, Any]]:
    """Every line with its target and no figure."""
    for row, content in ROWS.items():
        for line in content.lines:
            note = f"not yet run; {line.missing}" if line.missing else "not yet run"
            yield entry(row, line, {"figure": None, "note": note}, command)


class Table:
    """The table on disk, rewritten with each line."""

    def __init__(self, output: Path, command: str):
        """Lists every line that is not in the table, so that nothing is left out of it."""
        self.output, self.command = output, command
        self.rows = merge_rows(not_yet_run(command), read_rows(output))
        write_table(self.rows, output)

    def has_figure(self, row: str, line: Line) -> bool:
        """Whether the line was measured, now or before."""
        return any(r["figure"] is not None for r in self.rows if (r["id"], r["what"]) == (row, line.what))

    def add(self, row: str, line: Line, found: dict[str, Any]) -> None:
        """Writes the line and tells it."""
        whole = entry(row, line, found, self.command)
        figure = "-" if whole["figure"] is None else f"{whole['figure']:.4f}"
        print(f"{row:4s} {figure:>10s}  {line.must:10s} {line.what}: {whole['note']}", flush=True)
        self.rows = merge_rows(self.rows, [whole])
        write_table(self.rows, self.output)


def measure_rows(names: list[str], table: Table, argument: tuple[str, int], seconds: float) -> None:
    """Runs the rows in a process of their own and writes each line when it comes."""
    jobs = [Job(name, ROWS[name].weight, ROWS[name].fresh) for name in names if _is_measurable(name)]
    for name in names:
        for line in ROWS[name].lines:
            if line.missing:
                table.add(name, line, {"figure": None, "note": line.missing})
    told: set[tuple[str, str]] = set()
    for name, found in run_jobs(jobs, make_worker, argument, seconds):
        lines = {line.what: line for line in ROWS[name].lines}
        if not isinstance(found, End):
            told.add((name, found["what"]))
            table.add(name, lines[found["what"]], found)
            continue
        for line in lines.values():
            kept = not found.begun and table.has_figure(name, line)
            if found.problem and line.measure is not None and (name, line.what) not in told and not kept:
                table.add(name, line, {"figure": None, "note": f"not measured: {found.problem}"})


def _is_measurable(name: str) -> bool:
    return any(line.measure is not None for line in ROWS[name].lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help="such as G1,G3, in the order to run them (default: all)")
    add("--budget-seconds", type=float, default=570.0, help="for all rows together (default: 570)")
    add(
        "--rounds", type=int, default=10, help="timed rounds of each pair, at least 2, if the time allows (default: 10)"
    )
    add("--shape", choices=SHAPE_SETS, default="G", help="of models and batches (default: G)")
    add("--cache", type=Path, help="folder of compiled programs, kept; default: an empty one, deleted at the end")
    add("--list", action="store_true", help="run nothing: list every row with its target in the table")
    add("--output", type=Path, default=RESULTS, help="table without its suffix (default: experiments/results/gpu)")
    arguments = parser.parse_args(argv)
    arguments.rows = arguments.rows.split(",")
    for row in arguments.rows:
        if row not in ROWS:
            parser.error(f"--rows: no row {row!r}; there are {', '.join(ROWS)}")
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if arguments.shape != "G" and arguments.output == RESULTS:
        parser.error(f"--shape {arguments.shape}: give --output: this table is of shape G")
    if arguments.shape == "G" and not arguments.list and shutil.which("nvidia-smi") is None:
        parser.error("no NVIDIA GPU here: --shape tiny tries the script, --list lists the rows")
    return arguments


def main(argv: list[str]) -> None:
    """Measures the rows asked for and writes the table after each line."""
    arguments = parse(argv)
    table = Table(arguments.output, shlex.join(["python", "experiments/benchmark/gpu.py", *argv]))
    if arguments.list:
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        # what the worker's jax reads when it is imported there
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str((arguments.cache or Path(scratch)).absolute())
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        measure_rows(arguments.rows, table, (arguments.shape, arguments.rounds), arguments.budget_seconds)
    print(f"{time.monotonic() - start:.0f} s; {arguments.output}.md")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped too
    main(sys.argv[1:])
