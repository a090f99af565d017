"""What the public functions are given, checked where a mistake would end in an error about something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mor_jax.adapters import Adapter, Leaves
from mor_jax.injection.linear import LinearKind
from mor_jax.injection.plan import AdapterPlan
from mor_jax.injection.targets import InjectionError


def check_model(model: Any) -> None:
    """Returns for a linen module.

    Raises:
        InjectionError: it is something else.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InjectionError(f"the model must be a flax.linen module, made with its fields, not {what}")


def check_method(adapter: Any) -> None:
    """Returns for a method with its hyper-parameters.

    Raises:
        InjectionError: it is something else, such as a name or a class.
    """
    if not isinstance(adapter, Adapter):
        what = f"the class {adapter.__name__}" if isinstance(adapter, type) else repr(adapter)
        raise InjectionError(f"the method must be one like LoRA(rank=8), or make_adapter('lora', rank=8), not {what}")


def check_kinds(kinds: Any) -> tuple[LinearKind, ...]:
    """The table of linear modules as a tuple.

    Raises:
        InjectionError: it is one kind, or holds something else.
    """
    if isinstance(kinds, LinearKind):
        raise InjectionError("kinds must be a tuple, as kinds=(kind, *DEFAULT_KINDS), not one LinearKind")
    found = tuple(kinds) if isinstance(kinds, (tuple, list)) else (kinds,)
    wrong = [kind for kind in found if not isinstance(kind, LinearKind)]
    if wrong:
        raise InjectionError(f"kinds must be a tuple of LinearKind, and holds {wrong[0]!r}")
    return found


def check_overrides(overrides: Any) -> tuple[tuple[str, Adapter], ...]:
    """The overrides as a tuple of pairs.

    Raises:
        InjectionError: one of them is no pair of a pattern and a method.
    """
    found = tuple(overrides.items()) if isinstance(overrides, Mapping) else tuple(overrides)
    for pair in found:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InjectionError(
                f"overrides must be (pattern, method) pairs, as (('q_proj', LoRA(rank=4)),), not {pair!r}"
            )
        check_method(pair[1])
    return tuple((pattern, method) for pattern, method in found)


def check_plan(plan: Any) -> None:
    """Returns for an ``AdapterPlan``.

    Raises:
        InjectionError: it is something else.
    """
    if not isinstance(plan, AdapterPlan):
        raise InjectionError(f"the plan must be what resolve_sites returns, not {type(plan).__name__}")


def check_params(params: Any, plan: AdapterPlan) -> None:
    """Returns for base parameters, those of ``variables["params"]``, that hold what the plan adapts.

    Raises:
        InjectionError: they are a whole model's variables, adapters, or another model's.
    """
    check_plan(plan)
    if isinstance(params, Leaves):
        raise InjectionError("the base's parameters are wanted, and this is a Leaves: give variables['params']")
    if not isinstance(params, Mapping):
        raise InjectionError(
            f"the base's parameters must be nested dictionaries of arrays, not {type(params).__name__}"
        )
    for adapted in plan.sites:
        tree: Any = params
        for name in adapted.kernel_path:
            tree = tree[name] if isinstance(tree, Mapping) and name in tree else None
        if tree is not None:
            continue
        if isinstance(params.get("params"), Mapping):
            raise InjectionError("these are whole variables: give the parameters alone, variables['params']")
        if adapted.site.path in params:
            raise InjectionError("the base's parameters are wanted, and these are adapters: give variables['params']")
        raise InjectionError(f"the parameters have no {'/'.join(adapted.kernel_path)}: are they of another model?")


def check_leaves(leaves: Any) -> None:
    """Returns for a ``Leaves``.

    Raises:
        InjectionError: it is its ``params`` alone, or something else.
    """
    if not isinstance(leaves, Leaves):
        what = "a dictionary" if isinstance(leaves, Mapping) else type(leaves).__name__
        raise InjectionError(
            f"the adapters must be a Leaves, as init_leaves makes it, not {what}: give leaves._replace(params=trained)"
        )


def check_collections(variables: Any, plan: AdapterPlan) -> None:
    """Returns for variables of an adapted model.

    Raises:
        InjectionError: one of the collections is missing, or holds something else.
    """
    check_plan(plan)
    if not isinstance(variables, Mapping):
        raise InjectionError(
            f'variables must be {{"params": base, "adapters": leaves.params}}, not {type(variables).__name__}'
        )
    if "adapters" not in variables:
        raise InjectionError("no collection 'adapters' among the variables; init_leaves makes it")
    if "params" not in variables:
        raise InjectionError(
            "no collection 'params' among the variables: give the base's parameters beside the adapters"
        )
    for name, field in (("adapters", "params"), ("adapter_state", "state"), ("adapter_constants", "constants")):
        given = variables.get(name, {})
        if isinstance(given, Leaves):
            raise InjectionError(f"the collection {name!r} must be leaves.{field}, and this is a whole Leaves")
        if not isinstance(given, Mapping):
            raise InjectionError(f"the collection {name!r} must be leaves.{field}, not {type(given).__name__}")
    check_params(variables["params"], plan)
