"""`mor merge` and `mor export`: what is made of a run folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from mor_jax.cli.calibration import merge_batches
from mor_jax.cli.flags import UsageError
from mor_jax.cli.opening import LiveModel, load_tokenizer, open_run
from mor_jax.cli.options import ExportOptions, MergeOptions
from mor_jax.merging import MERGES, FidelityReport, language_model_call, merge_routed
from mor_jax.models import Decoder, save_params
from mor_jax.training.integrity import write_manifest


def check_output(directory: str) -> Path:
    """The path of a folder that is to be made.

    Raises:
      UsageError: it exists and holds something.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--output-dir {path}: exists and is not empty; choose another folder")
    return path


def merged_model(live: LiveModel, options: MergeOptions | ExportOptions) -> tuple[dict, FidelityReport]:
    """The run's base with its adapter folded in, and how faithful that is.

    Raises:
      UsageError: `gates` is not a way to merge, not built, or names no task of the run.
      DataError: the calibration data are not usable.
    """
    assert live.plan is not None and live.leaves is not None
    if options.batches < 1:
        raise UsageError(f"--batches must be at least 1, got {options.batches}")
    tokenizer = load_tokenizer(live.directory)
    calibration, held_out = merge_batches(live, tokenizer, options.calibration, options.batches)
    return merge_routed(
        Decoder(live.config),
        live.params,
        live.leaves,
        live.plan,
        calibration=calibration,
        heldout=held_out,
        gates=options.gates or "best",
        tasks=live.tasks,
        call=functools.partial(language_model_call, num_tasks=len(live.tasks)),
    )


def check_gates(gates: str, tasks: tuple[str, ...]) -> None:
    """Raises UsageError unless `gates` is empty or a way to merge that is built."""
    if gates == "distill":
        raise UsageError("--gates distill is not built yet; use least_squares, mean or task:NAME")
    if gates.startswith("task:") and gates.removeprefix("task:") not in tasks:
        raise UsageError(f"--gates {gates}: no such task; the run has {', '.join(tasks) or 'none by name'}")
    if gates and not gates.startswith("task:") and gates not in MERGES:
        raise UsageError(f"--gates {gates}: choose one of {', '.join(MERGES)}, task:NAME")


def merge_command(options: MergeOptions) -> dict[str, Any]:
    """Writes the merged base with `fidelity.json`; returns `exact`, `max_logit_difference`, `kl` and more of the report.

    Raises:
      UsageError, DataError, ModelFileError: bad input; nothing has been written.
    """
    output = check_output(options.output_dir)
    live = open_run(options.run)
    check_gates(options.gates, live.tasks)
    merged, report = merged_model(live, options)
    save_params(merged, live.config, output, source_dir=live.directory)
    report.save(output)
    write_manifest(output)
    summary = {name: value for name, value in dataclasses.asdict(report).items() if name != "site_errors"}
    return summary | {"output_dir": str(output)}
