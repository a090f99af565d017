"""Constant gates for methods that hand values on from layer to layer: what share the earlier layers' values have.

Such a method (ResLoRA's ``input`` and ``middle``) reads at layer n what layer n - 1 saw. Taking x_{n-1} to be x_n times
the ratio of their norms, the change is one of x_n alone and merges. Without data the norms of the merged weights that
make x stand for its own. How well either does is for a fidelity report to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mor_jax.adapters import Leaves
from mor_jax.adapters.precision import full_precision
from mor_jax.injection import AdapterPlan, link_leaves, site_kernels
from mor_jax.injection.leaves import site_leaves
from mor_jax.merging.calibration import Batch, ModelCall, collect, language_model_call


@full_precision
def earlier_shares(
    model: nn.Module,
    params: Any,
    leaves: Leaves,
    plan: AdapterPlan,
    batches: Sequence[Batch] = (),
    *,
    call: ModelCall = language_model_call,
    by: Literal["input", "weight"] = "input",
) -> dict[str, Array]:
    """The constant gates of every chained site: {path: (layers..., 1) float32}.

    Args:
        model: The base module.
        params: Its frozen parameters; not changed.
        leaves: The adapters.
        plan: From ``resolve_sites``.
        batches: Calibration batches, for ``by="input"``; the sums of x^T x of all chained sites are held at once.
        call: Batch -> (args, kwargs, adapter inputs).
        by: Whose norms stand for those of the layers' values: the inputs', or the merged weights'.

    Raises:
        ValueError: if ``by`` is neither, is not defined for the method's form, or there are no batches.
    """
    if by not in ("input", "weight"):
        raise ValueError(f"by must be input or weight, got {by!r}")
    if by == "input" and not batches:
        raise ValueError("shares by input need at least one calibration batch")
    leaves = link_leaves(plan, leaves)
    paths = [s.site.path for name in plan.chained for s in plan.chains[name]]
    sums = collect(model, params, leaves, plan, paths, batches, call) if by == "input" else {}
    shares: dict[str, Array] = {}
    for name in plan.chained:
        sites, norms = plan.chains[name], []
        for adapted in sites:
            own, count = site_leaves(leaves, adapted.site.path), adapted.site.num_layers
            if by == "input":
                measured = adapted.adapter.input_norm(own, sums[adapted.site.path]["xx"])
            else:
                measured = adapted.adapter.weight_norm(own, site_kernels(params, adapted))
            norms.append(measured.reshape(count))
        share = sites[0].adapter.earlier_share(jnp.concatenate(norms), by)
        ends = itertools.accumulate(adapted.site.num_layers for adapted in sites)
        for adapted, end in zip(sites, ends, strict=True):
            own = share[end - adapted.site.num_layers : end]
            shares[adapted.site.path] = own.reshape(*adapted.stack_sizes, 1)
    return shares
