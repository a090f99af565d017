"""Learning-rate schedules and any optax optimiser by name: clip -> optimiser with masked weight decay.

Each method says which of its leaves decay (`Adapter.decays`: by default matrices do and vectors do not). Of a module
that is trained whole kernels and embeddings decay, biases and norms do not, as is usual with AdamW. Leaves come stacked
over layers, so axes are counted in one layer: whether layers are scanned or looped changes no decay. Optimisers that
take a norm of a whole leaf (lamb, lars, novograd, fromage, adafactor) still see the layers of a stack as one.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from mor_jax.injection import AdapterPlan
from mor_jax.training.config import ConfigError, TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of each optimiser step: linear warm-up to the peak, then cosine, linear or constant.

    The peak is reached at step `warmup_steps`, the final rate at step `steps`.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    rest = max(1, config.steps - config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_learning_rate_ratio)
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


_SPARED = re.compile(r"(.*/)?(bias|scale|\w*norm(_?\d+)?/.*)", re.IGNORECASE)  # paths of leaves that are no kernel


def decays_by_name(path: str, ndim: int) -> bool:
    """Whether a leaf of a base's module decays: two axes or more in one layer, no bias or scale, in no norm.

    Args:
      path: of the leaf, joined by "/".
      ndim: its axes in one layer.
    """
    return ndim >= 2 and _SPARED.fullmatch(path) is None


def decay_mask(params: Any, stacked: Callable[[str], int] | None = None) -> Any:
    """For parameters of no plan: True for every leaf with two axes or more in one layer, but for biases and norms.

    Args:
      params: pytree of arrays.
      stacked: number of leading layer axes of the leaf at a path ("layers/q_proj/a"); None takes one for paths that
        start with "layers/", as injection stacks them.
    """

    def mask(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = stacked(name) if stacked is not None else int(name.startswith("layers/"))
        return decays_by_name(name, leaf.ndim - layers)

    return jax.tree.map_with_path(mask, params)


def plan_decay_mask(plan: AdapterPlan) -> Callable[[Any], Any]:
    """params -> True for every leaf that decays, as the plan's methods say, and by name in modules trained whole."""
    ndims = dict(plan.trained_ndims)
    owners = {path: (sites[0].adapter, 0) for path, sites in plan.shared.items()}
    owners |= {path: (adapted.adapter, len(adapted.stack_sizes)) for path, adapted in plan.gates.items()}
    owners |= {adapted.site.path: (adapted.adapter, len(adapted.stack_sizes)) for adapted in plan.sites}

    def mask(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        place, _, own = name.rpartition("/")
        if place in owners and name not in ndims:
            method, layers = owners[place]
            return method.decays(own, leaf.ndim - layers)
        return decays_by_name(name, ndims[name] if name in ndims else leaf.ndim)

    return lambda params: jax.tree.map_with_path(mask, params)


def make_optimizer(
    config: TrainConfig,
    inner: optax.GradientTransformation | None = None,
    mask: Callable[[Any], Any] = decay_mask,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run.

    Args:
      config: names the optimiser, its options, rate, decay and clipping.
      inner: an optimiser made in Python to use instead of `config.optimizer`; its rate and decay are its own.
      mask: params -> pytree of bools, True where weights decay.

    Raises:
      ConfigError: optax has no optimiser of that name (the nearest are listed), or it lacks an option.
    """
    if inner is None:
        inner = _by_name(config, mask)
    steps = [inner] if config.clip_norm == 0 else [optax.clip_by_global_norm(config.clip_norm), inner]
    return optax.with_extra_args_support(optax.chain(*steps))


def _by_name(config: TrainConfig, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    make: Any = getattr(optax, config.optimizer, None)
    parameters = inspect.signature(make).parameters if _takes_learning_rate(make) else {}
    if not parameters:
        names = [name for name in dir(optax) if _takes_learning_rate(getattr(optax, name))]
        near = difflib.get_close_matches(config.optimizer, names, n=3) or names
        raise ConfigError(f"optimizer={config.optimizer!r}: optax has no such optimiser: try {', '.join(near)}")
    native = _native_decay(config, parameters, mask)
    decay = optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay and not native else None
    options: dict[str, Any] = native | dict(config.optimizer_options)
    _check_options(config, parameters, options)
    try:
        made = make(learning_rate=make_schedule(config), **options)
        _trace(made)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        given = f"optimizer_options={config.optimizer_options!r}: " if config.optimizer_options else ""
        raise ConfigError(f"optimizer={config.optimizer!r}: {given}a plain step cannot run it: {reason}") from error
    return made if decay is None else optax.chain(decay, made)


def _native_decay(config: TrainConfig, parameters: Any, mask: Callable[[Any], Any]) -> dict[str, Any]:
    """The optimiser's own arguments for masked decay by `weight_decay` times the rate; {} where it has no mask."""
    if "mask" in parameters:
        return {"weight_decay": config.weight_decay, "mask": mask}
    if "weight_decay_mask" not in parameters:
        return {}
    if "weight_decay" in parameters:
        return {"weight_decay": config.weight_decay, "weight_decay_mask": mask}
    schedule = make_schedule(config)  # adafactor's is what a step takes off, whatever the learning rate
    rate = (lambda step: config.weight_decay * schedule(step)) if config.weight_decay else None
    return {"weight_decay_rate": rate, "weight_decay_mask": mask}


def _check_options(config: TrainConfig, parameters: Any, options: dict[str, Any]) -> None:
    for name in options:
        if name == "learning_rate":
            raise ConfigError("optimizer_options: learning_rate is a field of its own: set it there")
        if name not in parameters:
            near = difflib.get_close_matches(name, list(parameters), n=3) or list(parameters)
            raise ConfigError(f"optimizer_options: {config.optimizer} has no {name!r}: try {', '.join(near)}")
    if options.get("weight_decay") and not {"mask", "weight_decay_mask"} & set(parameters):
        raise ConfigError(
            f"optimizer_options: {config.optimizer}'s weight_decay reaches every leaf: set weight_decay, a field of "
            "its own, which spares biases and norms"
        )


def _trace(optimizer: optax.GradientTransformation) -> None:
    """Raises what the optimiser raises when it cannot follow a schedule, lacks an input or has a bad option."""
    params = {"layers/site": {"leaf": jax.ShapeDtypeStruct((1, 2, 2), "float32")}}
    state = jax.eval_shape(optimizer.init, params)
    jax.eval_shape(optimizer.update, params, state, params)


def _takes_learning_rate(candidate: Any) -> bool:
    if not inspect.isfunction(candidate):
        return False
    return "learning_rate" in inspect.signature(candidate).parameters


def optimizer_bytes(optimizer: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the optimiser's state for `params` (arrays or shapes); allocates nothing."""
    state = jax.eval_shape(optimizer.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
