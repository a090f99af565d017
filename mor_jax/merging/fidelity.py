"""How faithfully a merged model imitates the routed one, on data that calibration did not see."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.precision import full_precision
from mor_jax.finite import NotFiniteError, require_finite
from mor_jax.injection import AdapterPlan, site_kernels
from mor_jax.merging.calibration import Batch, ModelCall, collect, forward, language_model_call
from mor_jax.processes import gathered


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """Merged against routed, on held-out tokens.

    Attributes:
        method: How the model was merged.
        exact: Whether every site has an exact merge, so that only rounding is left.
        kl: Mean over tokens of KL(routed || merged) of the next-token distributions, in nats.
        max_logit_difference: Largest absolute difference of any logit.
        mean_logit_difference: Mean absolute difference.
        same_token: Share of tokens for which both find the same next token likeliest.
        tokens: Held-out tokens compared.
        site_errors: {path: one number a layer}: sqrt(E||x D - delta||^2 / E||delta||^2) on the routed model's inputs,
            D the change of the stored kernel.
        metrics: The task metric, {"routed": ..., "merged": ...}, where one was given.
        candidates: {method: kl} when several were measured.

    Raises:
        NotFiniteError: A figure is not finite.
    """

    method: str
    exact: bool
    kl: float
    max_logit_difference: float
    mean_logit_difference: float
    same_token: float
    tokens: int
    site_errors: dict[str, list[float]]
    metrics: dict[str, float] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        names = ("kl", "max_logit_difference", "mean_logit_difference", "same_token")
        where = f"fidelity of the merge by {self.method}"
        require_finite({name: getattr(self, name) for name in names} | self.metrics | self.candidates, where)

    def save(self, directory: str | Path) -> Path:
        """Writes ``fidelity.json`` into an existing directory and returns its path."""
        path = Path(directory) / "fidelity.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path


def check_unseen(calibration: Sequence[Batch], heldout: Sequence[Batch], key: str = "input_ids") -> None:
    """Raises ValueError if a held-out row is also a calibration row (rows of padding aside)."""

    def rows(batches: Sequence[Batch]) -> set[bytes]:
        found = set()
        for batch in batches:
            tokens = np.asarray(batch[key])
            real = np.asarray(batch["segment_ids"]) > 0 if "segment_ids" in batch else np.ones(tokens.shape[:2], bool)
            found |= {np.ascontiguousarray(row).tobytes() for row, mask in zip(tokens, real, strict=True) if mask.any()}
        return found

    both = rows(calibration) & rows(heldout)
    if both:
        raise ValueError(
            f"{len(both)} held-out rows are also calibration rows; fidelity needs data calibration did not see"
        )


def site_errors(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    merged: Any,
    batches: Sequence[Batch],
    call: ModelCall = language_model_call,
) -> dict[str, list[float]]:
    """{path: relative error of each layer}; 0 where the adapter does nothing and the kernel did not change.

    Raises:
        NotFiniteError: Inputs, adapter or kernels of a site are not finite.
    """
    kernels = {adapted.site.path: site_kernels(merged, adapted).value for adapted in plan.sites}
    found = {}
    for path, sums in collect(model, params, leaves, plan, plan.paths, batches, call, kernels).items():
        error, norm = (np.asarray(gathered(sums[name]), np.float64).reshape(-1) for name in ("error", "norm"))
        if not np.isfinite([error, norm]).all():
            raise NotFiniteError(path, "the adapter's change or the merged one is not finite")
        ratio = np.where(norm > 0, error / np.where(norm > 0, norm, 1), np.where(error > 0, 1.0, 0.0))
        found[path] = np.sqrt(ratio).tolist()
    return found


def compare_logits(left: Array, right: Array, mask: Array) -> dict[str, Array]:
    """Sums over the tokens of ``mask``: kl, mean, same, tokens; and the largest difference, max.

    Args:
        left: (..., V) the routed model's logits.
        right: (..., V) the merged model's.
        mask: (...,) true where a token counts.
    """
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    log_p, log_q = jax.nn.log_softmax(left), jax.nn.log_softmax(right)
    difference = jnp.where(mask[..., None], jnp.abs(left - right), 0.0)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    return {
        "kl": jnp.where(mask, kl, 0.0).sum(),
        "mean": difference.mean(-1).sum(),
        "same": ((left.argmax(-1) == right.argmax(-1)) & mask).sum(),
        "tokens": mask.sum(),
        "max": difference.max(),
    }


def counted_rows(batch: Batch, logits: Array) -> Array:
    """(...,) bool: which rows of the logits (..., V) are of no padding."""
    segments = batch.get("segment_ids")
    mask = jnp.ones(logits.shape[:-1], bool) if segments is None else segments > 0
    if mask.ndim == logits.ndim:  # one row of logits for each row of tokens, as classifiers give
        mask = mask.any(-1)
    return mask


def measure_fidelity(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    merged: Any,
    batches: Sequence[Batch],
    *,
    call: ModelCall = language_model_call,
    method: str = "exact",
    evaluate: Callable[[Callable[[Batch], Array]], float] | None = None,
    sites: bool = True,
) -> FidelityReport:
    """The report on a merged model.

    Args:
        model: The base module.
        params: Its frozen parameters (not donated to the merge).
        leaves: The adapters.
        plan: From ``resolve_sites``.
        merged: The merged parameters.
        batches: Held-out batches.
        call: Batch -> (args, kwargs, adapter inputs); the model returns logits (..., V) for it.
        method: Named in the report.
        evaluate: (batch -> logits) -> a task metric, measured for both models.
        sites: Whether to measure the error of each site.

    Raises:
        ValueError: if no held-out token counts.
        NotFiniteError: a figure is not finite.
    """
    total = _added_up(functools.partial(_compare_batch, model, plan, call, params, leaves, merged), batches)
    routed = functools.partial(routed_logits, model, plan, call, params, leaves)
    plain = functools.partial(_plain_logits, model, call, merged)
    tokens = total.get("tokens", 0.0)
    if tokens == 0:
        raise ValueError("fidelity needs at least one held-out token")
    return FidelityReport(
        method=method,
        exact=all(s.adapter.merges_exactly for s in plan.sites),
        kl=float(np.maximum(total["kl"] / tokens, 0.0)),  # unlike Python's, NaN where it is
        max_logit_difference=total["max"],
        mean_logit_difference=total["mean"] / tokens,
        same_token=total["same"] / tokens,
        tokens=int(tokens),
        site_errors=site_errors(model, params, leaves, plan, merged, batches, call) if sites else {},
        metrics={} if evaluate is None else {"routed": evaluate(routed), "merged": evaluate(plain)},
    )


def _added_up(compare: Callable[[Batch], dict[str, Array]], batches: Sequence[Batch]) -> dict[str, float]:
    """What ``compare`` finds in each batch, summed over all; the largest where it is called max, NaN if one is."""
    total: dict[str, float] = {}
    for batch in batches:
        for name, value in compare({name: jnp.asarray(value) for name, value in batch.items()}).items():
            before = total.get(name, 0.0)
            total[name] = float(np.maximum(before, float(value))) if name == "max" else before + float(value)
    return total


@functools.partial(jax.jit, static_argnames=("model", "plan", "call"))
@full_precision
def routed_logits(
    model: nn.Module, plan: AdapterPlan, call: ModelCall, params: Any, leaves: Leaves, batch: Batch
) -> Array:
    """The routed model's logits on a batch; compiled once for all merges of a model."""
    return forward(model, plan, params, leaves, batch, call)


@functools.partial(jax.jit, static_argnames=("model", "call"))
@full_precision
def _plain_logits(model: nn.Module, call: ModelCall, params: Any, batch: Batch) -> Array:
    args, kwargs, _ = call(batch)
    return model.apply({"params": params}, *args, **kwargs)  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames=("model", "plan", "call"))
@full_precision
def _compare_batch(
    model: nn.Module, plan: AdapterPlan, call: ModelCall, params: Any, leaves: Leaves, merged: Any, batch: Batch
) -> dict[str, Array]:
    """``compare_logits`` of one batch; compiled once for all merges of a model."""
    left = routed_logits(model, plan, call, params, leaves, batch)
    return compare_logits(left, _plain_logits(model, call, merged, batch), counted_rows(batch, left))
