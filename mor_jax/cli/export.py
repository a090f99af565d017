"""`mor export`: a run folder for other software, compared with the live model where asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mor_jax.adapters import Leaves
from mor_jax.cli.flags import UsageError
from mor_jax.cli.merge import check_gates, check_output, merged_model, report_summary, run_batches, run_call
from mor_jax.cli.opening import LiveModel, at_rank, open_run
from mor_jax.cli.options import ExportOptions
from mor_jax.export import Verification, export_hf, export_peft, verify_adapter, verify_export, verify_peft
from mor_jax.injection import AdapterPlan
from mor_jax.merging import FidelityReport, least_squares, measure_fidelity, merge, refactor
from mor_jax.models import make_model

REFACTORING = ("least_squares", "sequential")


def export_command(options: ExportOptions) -> dict[str, Any]:
    """Writes the export; returns `verified`, `max_logit_difference` (null where nothing was compared) and more.

    The figures compare what was written with the live model, in float32: for `hf` with the live merged model, for the
    adapter formats with the live adapted one. `fidelity` is another matter: merged against adapted.

    Raises:
      UsageError, DataError, ModelFileError, ExportError: bad input; nothing has been written.
    """
    output = check_output(options.output_dir)
    if options.rank < 0:
        raise UsageError(f"--rank must not be negative, got {options.rank}")
    live = open_run(options.run)
    imitated = options.format == "peft" and any(a.adapter.routed for a in live.plan.sites) if live.plan else False
    live = live if imitated else at_rank(live, options.rank)
    check_gates(options.gates, live.tasks)
    write = {"hf": _export_hf, "peft": _export_peft, "safetensors": _export_adapter}[options.format]
    found, report = write(live, options, output)
    result: dict[str, Any] = {"verified": None, "max_logit_difference": None, "tolerance": None, "verified_with": None}
    if found is not None:
        result = {
            "verified": found.verified,
            "max_logit_difference": found.max_logit_difference,
            "tolerance": found.tolerance,
            "verified_with": found.reader,
        }
    if report is not None:
        result["fidelity"] = report_summary(report)
    return result | {"format": options.format, "output_dir": str(output)}


Outcome = tuple[Verification | None, FidelityReport | None]


def _export_hf(live: LiveModel, options: ExportOptions, output: Path) -> Outcome:
    """Always verified: by transformers with `--verify` where torch is installed, else by our own reader."""
    merged, report = merged_model(live, options)
    export_hf(merged, live.config, output, source_dir=live.directory, report=report)
    return verify_export(output, merged, live.config, reader="auto" if options.verify else "mor_jax"), report


def _export_peft(live: LiveModel, options: ExportOptions, output: Path) -> Outcome:
    plan, leaves, report = _plain_adapter(live, options)
    export_peft(plan, leaves, live.config, output, base_model=live.directory, report=report)
    if not options.verify:
        return None, report
    return verify_peft(output, live.directory, live.params, live.config, plan, leaves), report


def _export_adapter(live: LiveModel, options: ExportOptions, output: Path) -> Outcome:
    from mor_jax.training.adapter_file import save_adapter

    assert live.plan is not None
    assert live.leaves is not None
    save_adapter(output, live.plan, live.leaves, live.metadata)
    if not options.verify:
        return None, None
    return verify_adapter(output, live.params, live.config, live.plan, live.leaves), None


def _plain_adapter(live: LiveModel, options: ExportOptions) -> tuple[AdapterPlan, Leaves, FidelityReport | None]:
    """The run's adapter; for gates that read the input, the LoRA that imitates it best, and how well."""
    assert live.plan is not None
    assert live.leaves is not None
    routed = [adapted for adapted in live.plan.sites if adapted.adapter.routed]
    if not routed:
        return live.plan, live.leaves, None
    if options.gates not in REFACTORING:
        raise UsageError(
            f"--format peft: {routed[0].adapter.name} reads its gates from the input and PEFT has no such method; give "
            "--gates least_squares for the LoRA that imitates it best, or --format hf for the merged model"
        )
    rank = options.rank or getattr(routed[0].adapter, "rank", 8)
    for site in (adapted.site for adapted in routed):
        if rank > min(site.in_features, site.out_features):
            raise UsageError(f"--rank {rank}: {site.path} has only {min(site.in_features, site.out_features)} ranks")
    model, call = make_model(live.config), run_call(live)
    calibration, held_out = run_batches(live, options)
    sequential = options.gates == "sequential"
    found = least_squares(model, live.params, live.leaves, live.plan, calibration, call=call, sequential=sequential)
    plan, leaves = refactor(found, live.leaves, live.plan, rank)
    merged = merge(live.params, leaves, plan)
    report = measure_fidelity(
        model, live.params, live.leaves, live.plan, merged, held_out, call=call, method=f"{options.gates}, rank {rank}"
    )
    return plan, leaves, dataclasses.replace(report, exact=False)
