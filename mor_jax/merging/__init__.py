"""Folding adapters into the frozen base, exactly where that is possible and measurably well where it is not."""

from mor_jax.merging.approximate import APPROXIMATIONS, MERGES, merge_routed, merge_words
from mor_jax.merging.calibration import ModelCall, language_model_call, solve_ridge
from mor_jax.merging.chain import earlier_shares
from mor_jax.merging.check import MergeCheck, check_merge
from mor_jax.merging.exact import lower_merge, merge
from mor_jax.merging.factors import as_lora
from mor_jax.merging.fidelity import (
    FidelityReport,
    check_unseen,
    compare_logits,
    measure_fidelity,
    routed_logits,
    site_errors,
)
from mor_jax.merging.gates import mean_gates
from mor_jax.merging.least_squares import (
    Calibration,
    factorize,
    least_squares,
    merge_changes,
    refactor,
    routed_paths,
)

__all__ = [
    "APPROXIMATIONS",
    "MERGES",
    "Calibration",
    "FidelityReport",
    "MergeCheck",
    "ModelCall",
    "as_lora",
    "check_merge",
    "check_unseen",
    "compare_logits",
    "earlier_shares",
    "factorize",
    "language_model_call",
    "least_squares",
    "lower_merge",
    "mean_gates",
    "measure_fidelity",
    "merge",
    "merge_changes",
    "merge_routed",
    "merge_words",
    "refactor",
    "routed_logits",
    "routed_paths",
    "site_errors",
    "solve_ridge",
]
