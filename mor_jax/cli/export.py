"""`mor export`: a run folder for other software, compared with the live model where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mor_jax.adapters import Leaves, NotMergeable
from mor_jax.cli.flags import UsageError
from mor_jax.cli.merge import (
    LOW_RANK,
    check_gates,
    check_output,
    kept_dtype,
    low_rank,
    merged_model,
    opened_at_rank,
    report_summary,
    write_merged,
)
from mor_jax.cli.opening import LiveModel
from mor_jax.cli.options import ExportOptions
from mor_jax.export import (
    ExportError,
    Verification,
    export_peft,
    probe_tokens,
    verify_adapter,
    verify_export,
    verify_peft,
)
from mor_jax.injection import AdapterPlan
from mor_jax.merging import FidelityReport, as_lora
from mor_jax.models import carried_files
from mor_jax.models.dtypes import STORED
from mor_jax.processes import is_alone


def export_command(options: ExportOptions) -> dict[str, Any]:
    """Writes the export; returns `verified`, `max_logit_difference` (null where nothing was compared) and more.

    The figures compare what was written with the live model, in float32: for `hf` with the live merged model, for the
    adapter formats with the live adapted one. `fidelity` is another matter: merged against adapted.

    Raises:
      UsageError, DataError, ModelFileError, ExportError: bad input; nothing has been written.
    """
    output = check_output(options.output_dir)
    if options.dtype is not None and options.format != "hf":
        raise UsageError(f"--dtype {options.dtype}: is for --format hf; an adapter is written in float32, as trained")
    # PEFT puts the adapter on what the file holds; our own format is checked on what was trained on
    kept = {"hf": kept_dtype(options), "peft": STORED, "safetensors": None}[options.format]
    live = opened_at_rank(options, kept)
    check_gates(options, live.tasks)
    if options.format == "hf":
        carried_files(live.directory)  # before the work
    write = {"hf": _export_hf, "peft": _export_peft, "safetensors": _export_adapter}[options.format]
    with live.on_devices():
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
    write_merged(merged, live, output, report, options.dtype)
    return verify_export(output, merged, live.config, **_probe(live, options)), report


def _probe(live: LiveModel, options: ExportOptions) -> dict[str, Any]:
    """What is compared, and by whom: torch knows nothing of other processes."""
    reader = "auto" if options.verify and is_alone() else "mor_jax"
    return {"tokens": probe_tokens(live.config, live.padded_rows(2)), "reader": reader}


def _export_peft(live: LiveModel, options: ExportOptions, output: Path) -> Outcome:
    plan, leaves, report = _plain_adapter(live, options)
    try:
        written, arrays = as_lora(plan, leaves, live.params)
    except NotMergeable as error:
        raise ExportError(f"--format peft: {error}; use --format hf for the merged model or safetensors") from error
    export_peft(written, arrays, live.config, output, base_model=live.directory, report=report)
    if not options.verify:
        return None, report
    own = (written, arrays)
    return verify_peft(
        output, live.directory, live.params, live.config, plan, leaves, written=own, **_probe(live, options)
    ), report


def _export_adapter(live: LiveModel, options: ExportOptions, output: Path) -> Outcome:
    from mor_jax.training.adapter_file import save_adapter

    assert live.plan is not None
    assert live.leaves is not None
    save_adapter(output, live.plan, live.leaves, live.metadata)
    if not options.verify:
        return None, None
    tokens = _probe(live, options)["tokens"]
    return verify_adapter(output, live.params, live.config, live.plan, live.leaves, tokens=tokens), None


def _plain_adapter(live: LiveModel, options: ExportOptions) -> tuple[AdapterPlan, Leaves, FidelityReport | None]:
    """The run's adapter; for gates that read the input, the LoRA that imitates it best, and how well."""
    assert live.plan is not None
    assert live.leaves is not None
    routed = [adapted for adapted in live.plan.sites if adapted.adapter.routed]
    if not routed:
        return live.plan, live.leaves, None
    if options.gates not in LOW_RANK:
        raise UsageError(
            f"--format peft: {routed[0].adapter.name} reads its gates from the input and PEFT has no such method; give "
            f"--gates {', '.join(LOW_RANK)} for the LoRA that imitates it best, or --format hf for the merged model"
        )
    plan, leaves, _, report = low_rank(live, options)
    return plan, leaves, report
