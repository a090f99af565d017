"""`mor merge`: a run's base with its adapter folded in."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from mor_jax.cli.calibration import Batches, merge_batches
from mor_jax.cli.flags import UsageError
from mor_jax.cli.opening import LiveModel, at_rank, load_tokenizer, open_run
from mor_jax.cli.options import ExportOptions, MergeOptions
from mor_jax.data import DataError
from mor_jax.export import export_hf, probe_tokens
from mor_jax.merging import MERGES, FidelityReport, ModelCall, language_model_call, merge_routed
from mor_jax.models import make_model


def check_output(directory: str) -> Path:
    """The path of a folder that is to be made.

    Raises:
      UsageError: it exists and holds something.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--output-dir {path}: exists and is not empty; choose another folder")
    return path


def run_call(live: LiveModel) -> ModelCall:
    """How the run's model is called on a batch, its tasks told apart."""
    return functools.partial(language_model_call, num_tasks=len(live.tasks))


def run_batches(live: LiveModel, options: MergeOptions | ExportOptions) -> tuple[Batches, Batches]:
    """(calibration batches, held-out batches) of the run or of `calibration`.

    An exact merge is not fitted on anything: where the run's own data are gone, random tokens measure its rounding.

    Raises:
      UsageError: `batches` is out of range.
      DataError: the calibration data are not usable.
    """
    assert live.plan is not None
    if options.batches < 1:
        raise UsageError(f"--batches must be at least 1, got {options.batches}")
    tokenizer = load_tokenizer(live.directory)
    try:
        return merge_batches(live, tokenizer, options.calibration, options.batches)
    except DataError as error:
        if options.calibration or not all(adapted.adapter.merges_exactly for adapted in live.plan.sites):
            raise
        print(f"mor: {error}; the merge is exact, so random tokens are compared instead", file=sys.stderr)
        return [], [{"input_ids": probe_tokens(live.config)}]


def merged_model(live: LiveModel, options: MergeOptions | ExportOptions) -> tuple[dict, FidelityReport]:
    """The run's base with its adapter folded in, and how faithful that is; raises as `run_batches`."""
    assert live.plan is not None
    assert live.leaves is not None
    calibration, held_out = run_batches(live, options)
    return merge_routed(
        make_model(live.config),
        live.params,
        live.leaves,
        live.plan,
        calibration=calibration,
        heldout=held_out,
        gates=options.gates or "best",
        tasks=live.tasks,
        call=run_call(live),
    )


def report_summary(report: FidelityReport) -> dict[str, Any]:
    """The report's figures less those of each site."""
    return {name: value for name, value in dataclasses.asdict(report).items() if name != "site_errors"}


def check_gates(gates: str, tasks: tuple[str, ...]) -> None:
    """Raises UsageError unless `gates` is empty or a way to merge that is built."""
    if gates == "distill":
        raise UsageError("--gates distill is not built yet; use least_squares, sequential, mean or task:NAME")
    if gates.startswith("task:") and gates.removeprefix("task:") not in tasks:
        raise UsageError(f"--gates {gates}: no such task; the run has {', '.join(tasks) or 'none by name'}")
    if gates and not gates.startswith("task:") and gates not in MERGES:
        raise UsageError(f"--gates {gates}: choose one of {', '.join(MERGES)}, task:NAME")


def merge_command(options: MergeOptions) -> dict[str, Any]:
    """Writes the merged base with `fidelity.json`; returns `exact`, `max_logit_difference`, `kl` and more of it.

    Raises:
      UsageError, DataError, ModelFileError: bad input; nothing has been written.
    """
    output = check_output(options.output_dir)
    live = at_rank(open_run(options.run), options.rank)
    check_gates(options.gates, live.tasks)
    merged, report = merged_model(live, options)
    export_hf(merged, live.config, output, source_dir=live.directory, report=report)
    return report_summary(report) | {"output_dir": str(output)}
