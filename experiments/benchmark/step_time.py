"""Speed, memory and FLOPs of a training step: the rows C1 to C16, remat and forms of one table.

    python experiments/benchmark/step_time.py --output experiments/results/step_time_cpu
    python experiments/benchmark/step_time.py --rows C1,C2 --rounds 20 --output experiments/results/step_time_cpu
    python experiments/benchmark/step_time.py --rows C6 --methods all --output experiments/results/step_time_cpu
    python experiments/benchmark/step_time.py --rows C11,C12 --data FILE.jsonl --tokenizer DIR --output ...

Every adapter's step is made by the ``make_step`` that ``mor train`` calls. Two programs, compiled ahead in one process,
are timed in turn, A, B, A, B, after two warm-ups; the figure is the median of the per-round ratios of process CPU time,
with its quartiles; below 1 A is faster. Rows that are not measured keep their place in the table. On two quiet cores a
row takes at most about three minutes (C6 that much for every seven methods).

Row: C1 LoRA ÷ floor. C2 LoRA ÷ full fine-tuning. C3 FLOPs. C4 dense mixtures ÷ LoRA of the same total rank. C5 top-k
mixture ÷ LoRA of the active rank. C6 methods ÷ LoRA. C7 chunked ÷ naive cross-entropy. C8 compiling 32 layers ÷ 4. C9
first step with a warm cache ÷ cold. C10 programs compiled after step one. C11 real batches ÷ a constant one. C12 packed
÷ padded. C13 saving ÷ not. C14 merged ÷ base. C15 ours ÷ PEFT on torch. C16 bytes. remat: its policies ÷ none.
forms: MoR's sum over experts in other forms ÷ ours. Rows about the loss, compiling and input are of LoRA alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compile_rows import compilations, many_layers, warm_cache
from form_rows import mixture_forms
from input_rows import input_overlap, packing, saving
from loss_rows import LARGE_VOCABULARY, chunked_loss
from programs import SHAPES
from step_rows import ROWS as STEP_ROWS
from step_rows import Bench
from table import describe_machine, merge_rows, read_rows, write_table
from torch_rows import against_peft

from mor_jax.adapters import METHODS

ALL = (*(f"C{number}" for number in range(1, 17)), "remat", "forms")
# Variables that pin the kernels of a BLAS or of torch to those of an old processor would slow one side of C15 only.
PINS = (
    "OPENBLAS_CORETYPE",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
)


def measure(row: str, bench: Bench, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one row."""
    shape, rounds = bench.shape, bench.rounds
    if row in STEP_ROWS:
        return STEP_ROWS[row](bench, arguments.methods)
    if row == "C7":
        return chunked_loss(shape, rounds, arguments.large_vocabulary)
    if row == "C8":
        return many_layers(shape, rounds)
    if row == "C9":
        return warm_cache(arguments.shape, rounds)
    if row == "C10":
        return compilations(arguments.methods)
    if row == "C11":
        return input_overlap(shape, rounds, arguments.data, arguments.tokenizer)
    if row == "C12":
        return packing(shape, rounds, arguments.data, arguments.tokenizer, arguments.row_length)
    if row == "C13":
        return saving(shape, rounds)
    if row == "forms":
        return mixture_forms(rounds)
    return against_peft(shape, rounds)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default="", help="such as C1,C2; default: all that the data given allow")
    add("--methods", default="lora,dora,mor", help="of C6 and C10; 'all' takes every registered one")
    add("--rounds", type=int, default=10, help="timed rounds of each pair, at least 2 (default: 10)")
    add("--shape", choices=SHAPES, default="S", help="of model and batch (default: S, that of the targets)")
    add("--data", action="append", default=[], help="instruction data for C11 and C12; may be repeated")
    add("--tokenizer", help="Hugging Face directory, for C11 and C12")
    add("--row-length", type=int, default=1024, help="tokens in a row of C12 (default: 1024)")
    add("--large-vocabulary", type=int, default=LARGE_VOCABULARY, help="of C7 (default: 131072)")
    add("--output", type=Path, required=True, help="table without its suffix")
    arguments = parser.parse_args(argv)
    has_data = bool(arguments.data and arguments.tokenizer)
    default = [row for row in ALL if has_data or row not in ("C11", "C12")]
    arguments.rows = arguments.rows.split(",") if arguments.rows else default
    arguments.methods = tuple(METHODS) if arguments.methods == "all" else tuple(arguments.methods.split(","))
    arguments.data = tuple(arguments.data)
    for row in arguments.rows:
        if row not in ALL:
            parser.error(f"--rows: no row {row!r}; there are {', '.join(ALL)}")
        if row in ("C11", "C12") and not has_data:
            parser.error(f"--rows {row}: needs --data and --tokenizer")
    for method in arguments.methods:
        if method not in METHODS:
            parser.error(f"--methods: no method {method!r}; there are {', '.join(METHODS)}")
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    return arguments


def main(argv: list[str]) -> None:
    """Measures the rows asked for and writes the table after each."""
    arguments = parse(argv)
    pinned = [name for name in PINS if name in os.environ]
    if pinned:
        sys.exit(f"{pinned[0]} is set, so that old kernels would be measured: unset {' '.join(pinned)}")
    command = shlex.join(["python", "experiments/benchmark/step_time.py", *argv])
    bench = Bench(SHAPES[arguments.shape], arguments.rounds)
    for row in arguments.rows:
        machine = describe_machine()
        for found in measure(row, bench, arguments):
            found = found | {"command": command, "machine": machine}
            print(f"{found['id']:4s} {found['figure']:10.4f}  {found['must']:10s} {found['what']}", flush=True)
            write_table(merge_rows(read_rows(arguments.output), [found]), arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
