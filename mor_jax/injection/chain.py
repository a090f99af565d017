"""What a layer hands on to the next one for methods whose change reads earlier layers (ResLoRA).

The model threads an opaque pytree beside its hidden states, ``(x, carry_extra)``, through a scan or a loop over layers.
The interceptor reads it where a block begins and puts another in its place where the block ends; the model never looks
inside. Each chained site has one entry, by the name of its chain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from mor_jax.injection.linear import find_kind, first_argument
from mor_jax.injection.plan import AdapterPlan
from mor_jax.injection.scopes import OwnModules
from mor_jax.injection.targets import InjectionError

ARGUMENT = "carry_extra"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """The carried pytree: {chain name: what its method hands on}."""

    sites: Mapping[str, Any]


def carried_chain(argument: Any) -> Chain | None:
    """The chain in a block's first argument ``(x, chain)``, or None."""
    if isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], Chain):
        return argument[1]
    return None


def replace_chain(output: Any, sites: Mapping[str, Any]) -> Any:
    """A block's output with another chain in it."""
    is_chain = lambda node: isinstance(node, Chain)  # noqa: E731
    return jax.tree.map(lambda node: Chain(sites) if is_chain(node) else node, output, is_leaf=is_chain)


def initial_chain(
    model: nn.Module, plan: AdapterPlan, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Chain:
    """What the first layer finds, of the shapes that this call's sites will have.

    Args:
        model: The base.
        plan: With at least one chained site.
        run: The base's forward pass; it is traced once more, abstractly.
        args: Of ``run``.
        kwargs: Of ``run``.

    Raises:
        InjectionError: if the model does not thread a carry; names the methods' form that needs none.
    """
    if ARGUMENT not in inspect.signature(type(model).__call__).parameters:
        method = plan.chains[plan.chained[0]][0].adapter
        raise InjectionError(
            f"{method.title} hands values on from layer to layer, and {type(model).__name__}.__call__ has no argument "
            f"{ARGUMENT!r} to carry them through its layers; choose form='block', which needs none"
        )
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    own = OwnModules()

    def record(next_fun, args, kwargs, context):
        module = context.module
        with own.call(module) as path:
            output = next_fun(*args, **kwargs)
            if context.method_name != "__call__" or path not in plan.paths or plan[path].chain not in plan.chained:
                return output
            kind = find_kind(module, plan.kinds)
            if kind is not None:
                shape = meta.unbox(module.get_variable("params", kind.kernel_leaf)).shape
                x = kind.contract(module, args, kwargs, shape).flatten_input(first_argument(args, kwargs))
                shapes.setdefault(plan[path].chain, (x.shape[:-1], output.dtype))
            return output

    with nn.intercept_methods(record):
        entered = {**kwargs, "method": own.entering(model, kwargs.get("method"))}
        jax.eval_shape(lambda: run(*args, **entered))
    sites = {}
    for name in plan.chained:
        if name not in shapes:
            raise InjectionError(f"{name} has an adapter but did not run in this call; exclude it from the targets")
        adapted = plan.chains[name][0]
        sites[name] = adapted.adapter.init_chain(adapted.site, *shapes[name])
    return Chain(sites)
