"""`mor merge`: a run's base with its adapter folded in."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mor_jax.adapters import Adapter, Leaves
from mor_jax.cli.calibration import Batches, merge_batches
from mor_jax.cli.flags import UsageError, parse_options
from mor_jax.cli.opening import LiveModel, at_rank, open_run
from mor_jax.cli.options import ExportOptions, MergeOptions
from mor_jax.cli.paths import check_makeable
from mor_jax.data import DataError
from mor_jax.export import export_hf, probe_tokens
from mor_jax.injection import AdapterPlan
from mor_jax.merging import (
    MERGES,
    FidelityReport,
    ModelCall,
    language_model_call,
    least_squares,
    measure_fidelity,
    merge,
    merge_routed,
    refactor,
    routed_paths,
)
from mor_jax.models import EncoderConfig, carried_files, make_model, round_params, written_dtypes
from mor_jax.models.dtypes import STORED
from mor_jax.training.distributed import check_same_content, first_decides
from mor_jax.training.recorded_base import expanded_path

_LOGGER = logging.getLogger(__name__)
LOW_RANK = ("least_squares", "sequential", "distill")


def check_output(directory: str) -> Path:
    """The path of a folder that is to be made.

    Raises:
      UsageError: it exists and holds something, or cannot be made.
    """
    path = Path(expanded_path(directory))

    def check() -> None:
        check_makeable(path, "--output-dir")
        if path.exists() and any(path.iterdir()):
            raise UsageError(f"--output-dir {path}: exists and is not empty; choose another folder")

    first_decides(check)
    return path


def opened_at_rank(options: MergeOptions | ExportOptions, kept: str | None = None) -> LiveModel:
    """The run; cut to `rank` if its adapter has a rank to cut, and is not one that a LoRA of that rank stands for.

    Args:
      options: which run, and how.
      kept: as in `open_run`.

    Raises:
      UsageError: there is no such run, its base is not there, or the rank is out of range.
      AdapterFileError: the base is not the run's.
    """
    live = open_run(options.run, mesh=options.mesh, base=options.model, kept=kept)
    if options.mergeable:
        live = _allowed_to_merge(live)
    imitated = live.plan is not None and any(adapted.adapter.routed for adapted in live.plan.sites)
    return live if imitated else at_rank(live, options.rank)


def _allowed_to_merge(live: LiveModel) -> LiveModel:
    """The run with the options set without which its methods refuse to be merged."""
    assert live.plan is not None

    def allowed(adapter: Adapter) -> Adapter:
        return dataclasses.replace(adapter, **parse_options(adapter.merge_condition))

    sites = (dataclasses.replace(site, adapter=allowed(site.adapter)) for site in live.plan.sites)
    return dataclasses.replace(live, plan=dataclasses.replace(live.plan, sites=tuple(sites)))


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
    tokenizer = live.tokenization()
    try:
        found = merge_batches(live, tokenizer, options.calibration, options.batches)
    except DataError as error:
        if options.calibration:
            raise
        if not all(adapted.adapter.merges_exactly for adapted in live.plan.sites):
            raise DataError(f"{error}; or name other records than the run's by --calibration FILE") from error
        _LOGGER.warning("%s; the merge is exact, so random tokens are compared instead", error)
        found = [], [{"input_ids": probe_tokens(live.config, live.padded_rows(2))}]
    rows = (batch["input_ids"] for batches in found for batch in batches)
    check_same_content("rows of the calibration and held-out data", rows)
    return found


def merged_model(live: LiveModel, options: MergeOptions | ExportOptions) -> tuple[dict, FidelityReport]:
    """The run's base with its adapter folded in, and how faithful that is; raises as `run_batches`, `low_rank`."""
    plan, leaves = live.plan, live.leaves
    assert plan is not None
    assert leaves is not None
    if routed_paths(plan) and (options.gates == "distill" or options.rank):
        return low_rank(live, options)[2:]
    calibration, held_out = run_batches(live, options)

    def distilled() -> dict:
        new_plan, new_leaves = _fit_low_rank(live, options, "distill", _rank(plan, 0), calibration)
        return merge(live.params, new_leaves, new_plan)

    return merge_routed(
        make_model(live.config),
        live.params,
        leaves,
        plan,
        calibration=calibration,
        heldout=held_out,
        gates=options.gates or "best",
        tasks=live.tasks,
        call=run_call(live),
        others={} if any(adapted.adapter.chained for adapted in plan.sites) else {"distill": distilled},
        rounding=_rounding(live, options),
    )


def kept_dtype(options: MergeOptions | ExportOptions) -> str:
    """In which dtype the base stays in memory to be merged, so that a sum is rounded once, to what is written.

    That is the base's own, or float32, which holds all others, where another is asked for.
    """
    return STORED if options.dtype is None else "float32"


def _rounding(live: LiveModel, options: MergeOptions | ExportOptions) -> Callable[[dict], dict]:
    """Rounds a merge to the dtypes that it is written in, so that its fidelity is that of the file."""
    dtypes = written_dtypes(live.config, live.directory, options.dtype)
    return lambda merged: round_params(merged, live.config, dtypes)


def low_rank(
    live: LiveModel, options: MergeOptions | ExportOptions
) -> tuple[AdapterPlan, Leaves, dict, FidelityReport]:
    """The LoRA that stands for gates that read the input, the base with it folded in, and how faithful that is.

    Raises:
      UsageError: `gates` makes no LoRA, or a site has not so many ranks.
      DataError: The calibration data are not usable.
    """
    plan, leaves = live.plan, live.leaves
    assert plan is not None
    assert leaves is not None
    if options.gates not in LOW_RANK:
        given = f", got --gates {options.gates}" if options.gates else ""
        raise UsageError(f"--rank {options.rank}: only --gates {', '.join(LOW_RANK)} make a LoRA{given}")
    chained = [adapted for adapted in plan.sites if adapted.adapter.chained]
    if chained:
        raise UsageError(
            f"--gates {options.gates}: {chained[0].adapter.name} hands values on from layer to layer, which no"
            " LoRA does; merge it by --gates least_squares without --rank"
        )
    rank = _rank(plan, options.rank)
    calibration, held_out = run_batches(live, options)
    new_plan, new_leaves = _fit_low_rank(live, options, options.gates, rank, calibration)
    merged = _rounding(live, options)(merge(live.params, new_leaves, new_plan))
    report = measure_fidelity(
        make_model(live.config),
        live.params,
        leaves,
        plan,
        merged,
        held_out,
        call=run_call(live),
        method=f"{options.gates}, rank {rank}",
    )
    return new_plan, new_leaves, merged, report


def _fit_low_rank(
    live: LiveModel, options: MergeOptions | ExportOptions, gates: str, rank: int, calibration: Batches
) -> tuple[AdapterPlan, Leaves]:
    """LoRAs in place of routed adapters, by one of `LOW_RANK`."""
    plan, leaves, call = live.plan, live.leaves, run_call(live)
    assert plan is not None
    assert leaves is not None
    own = (make_model(live.config), live.params, leaves, plan, calibration)
    if gates == "distill":
        from mor_jax.training.distillation import distill

        how: dict[str, Any] = {"learning_rate": options.learning_rate, "seed": options.seed}
        return distill(*own, rank=rank, call=call, steps=options.steps, **how)
    return refactor(least_squares(*own, call=call, sequential=gates == "sequential"), leaves, plan, rank)


def _rank(plan: AdapterPlan, asked: int) -> int:
    """The rank asked for, or the adapter's own as far as the sites have it.

    Raises:
      UsageError: A routed site has not so many ranks as were asked for.
    """
    routed = [plan[path] for path in routed_paths(plan)]
    site = min((adapted.site for adapted in routed), key=lambda site: min(site.in_features, site.out_features))
    most = min(site.in_features, site.out_features)
    if asked > most:
        raise UsageError(f"--rank {asked}: {site.path} has only {most} ranks")
    return asked or min(most, max(getattr(adapted.adapter, "rank", 8) for adapted in routed))


def report_summary(report: FidelityReport) -> dict[str, Any]:
    """The report's figures less those of each site."""
    return {name: value for name, value in dataclasses.asdict(report).items() if name != "site_errors"}


def check_gates(options: MergeOptions | ExportOptions, tasks: tuple[str, ...]) -> None:
    """Raises UsageError unless `gates` is empty or a way to merge, and the figures beside it are in range."""
    gates = options.gates
    if gates.startswith("task:") and gates.removeprefix("task:") not in tasks:
        raise UsageError(f"--gates {gates}: no such task; the run has {', '.join(tasks) or 'none by name'}")
    if gates and not gates.startswith("task:") and gates not in (*MERGES, "distill"):
        raise UsageError(f"--gates {gates}: choose one of {', '.join((*MERGES, 'distill'))}, task:NAME")
    for name in ("rank", "steps"):
        if getattr(options, name) < 0:
            raise UsageError(f"--{name} must not be negative, got {getattr(options, name)}")
    if options.learning_rate <= 0:
        raise UsageError(f"--learning-rate must be positive, got {options.learning_rate}")


def write_merged(merged: dict, live: LiveModel, output: Path, report: FidelityReport, dtype: str | None = None) -> None:
    """Writes the merged model as `export_hf` does, with the base's files and what ends generation in the run."""
    recorded = None if live.train is None else live.train.stop_tokens
    if isinstance(live.config, EncoderConfig):
        stop = ()
    else:
        stop = live.tokenization().stop if recorded is None else recorded
    export_hf(merged, live.config, output, source_dir=live.directory, report=report, dtype=dtype, stop_tokens=stop)


def merge_command(options: MergeOptions) -> dict[str, Any]:
    """Writes the merged base with `fidelity.json`; returns `exact`, `max_logit_difference`, `kl` and more of it.

    Raises:
      UsageError, DataError, ModelFileError: bad input; nothing has been written.
    """
    output = check_output(options.output_dir)
    live = opened_at_rank(options, kept_dtype(options))
    check_gates(options, live.tasks)
    carried_files(live.directory)  # before the work
    with live.on_devices():
        merged, report = merged_model(live, options)
        write_merged(merged, live, output, report, options.dtype)
    return report_summary(report) | {"output_dir": str(output)}
