"""What is known of each site of a model: whether an adapter reaches it, and may be folded into what is stored.

Where a kernel comes from is read off the traced program of the model: the module may be handed another one than is
stored (``nn.WeightNorm``, ``nn.map_variables``), and what is stored may be read elsewhere too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from mor_jax.injection.linear import LinearKind, find_kind
from mor_jax.injection.origins import BEGIN, END, Origin, Walk
from mor_jax.injection.plan import AdaptedSite
from mor_jax.injection.products import RESERVED, Call, call_of, first_line, shape_of, why_no_product
from mor_jax.injection.scopes import OwnModules
from mor_jax.injection.targets import InjectionError

_ADAPTER = "mor_jax adapter of "


@dataclass(frozen=True)
class Judgement:
    """What is known of one site.

    Attributes:
        reason: Why a change of the stored kernel is not a change of the output by x @ change; "" where it is.
        kernel_seen: Whether the module sees the kernel that is stored.
    """

    reason: str = ""
    kernel_seen: bool = True


@dataclass
class _Watch:
    """Names each site's kernel and a leaf of its adapter in the traced program, and keeps its first call."""

    kinds: tuple[LinearKind, ...]
    paths: Sequence[str]
    calls: dict[str, Call] = field(default_factory=dict)
    without_adapter: set[str] = field(default_factory=set)
    own: OwnModules = field(default_factory=OwnModules)

    def intercept(self, next_fun, args, kwargs, context):
        module = context.module
        with self.own.call(module) as path:
            kind = find_kind(module, self.kinds) if path in self.paths and context.method_name == "__call__" else None
            if kind is None or path is None:
                return next_fun(*args, **kwargs)
            kernel = meta.unbox(module.get_variable("params", kind.kernel_leaf))
            checkpoint_name(kernel, BEGIN + path)
            bundle = module.get_variable("params", RESERVED)
            if bundle is None:
                self.without_adapter.add(path)
            else:
                checkpoint_name(bundle["leaf"], _ADAPTER + path)
            output = next_fun(*args, **kwargs)
            checkpoint_name(kernel, END + path)
            if path not in self.calls:
                self.calls[path] = call_of(module, context.orig_method, kind, args, kwargs, kernel.shape)
            return output


def judge_sites(
    model: nn.Module,
    kinds: tuple[LinearKind, ...],
    sites: Sequence[AdaptedSite],
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Judgement]:
    """The judgement of each site, from a trace of ``model.apply`` and of its modules' own calls.

    Args:
        model: Any linen module.
        kinds: The table of linear modules.
        sites: As far as they are known.
        variables: Shapes of the model's variables.
        args: The model's, arrays or their shapes.
        kwargs: Likewise.

    Raises:
        InjectionError: if a site's adapter would not reach it as it is.
    """
    watch = _Watch(kinds, tuple(s.site.path for s in sites))
    marked = dict(variables["params"])
    for adapted in sites:
        shape = [3, 2]
        for position, size in zip(adapted.lifted_positions, adapted.stack_sizes, strict=False):
            shape.insert(min(position, len(shape)), size)
        leaf = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        marked = _with(marked, (*adapted.kernel_path[:-1], RESERVED), {"leaf": leaf})
    try:
        seen, used = _trace(model, watch, {**variables, "params": marked}, args, kwargs)
    except Exception as error:
        return _judge_untraced(model, watch, variables, args, kwargs, error)
    judged: dict[str, Judgement] = {}
    known: dict[str, str] = {}
    for adapted in sites:
        path, kernel = adapted.site.path, adapted.kernel_path
        where = (*kernel[:-1], RESERVED, "leaf")
        if path in watch.without_adapter or any(o is None or o.path != where for o in seen.get(_ADAPTER + path, [])):
            raise InjectionError(_unreachable(path))
        kernels = seen.get(BEGIN + path, [])
        if not all(o is not None and o.is_stored(kernel, adapted.lifted_positions) for o in kernels):
            judged[path] = Judgement("it sees its kernel through a function of what is stored", kernel_seen=False)
        elif used.get(kernel, set()) - {path}:
            judged[path] = Judgement("its kernel is also used outside of it")
        else:
            judged[path] = Judgement(why_no_product(watch.calls[path], known) if path in watch.calls else "")
    return judged


def _unreachable(path: str) -> str:
    return (
        f"{path}: its parameters reach it through a function that would change or drop an adapter's as well "
        "(nn.map_variables, nn.SpectralNorm); exclude it from the targets, or let that function touch the kernel alone"
    )


def _judge_untraced(model, watch: _Watch, variables, args, kwargs, error: Exception) -> dict[str, Judgement]:
    """Where the model cannot be run with adapters: an error if it can without, else nothing is known of any site."""
    try:
        _trace(model, _Watch(watch.kinds, ()), variables, args, kwargs)
    except Exception:
        reason = f"the model could not be traced on the example inputs ({first_line(error)})"
        return dict.fromkeys(watch.paths, Judgement(reason))
    raise InjectionError(_unreachable(", ".join(watch.paths))) from error


def _with(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {**tree, path[0]: value if len(path) == 1 else _with(tree.get(path[0], {}), path[1:], value)}


def _trace(
    model: nn.Module, watch: _Watch, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, list[Origin | None]], dict[tuple[str, ...], set[str]]]:
    """(what each name in the model's program stands for, in which sites each parameter is computed with)."""
    values, tree = jax.tree.flatten((args, kwargs))
    traced = {i: shape_of(v) for i, v in enumerate(values) if hasattr(v, "shape")}
    params = meta.unbox(variables["params"])

    def run(params, others, key, traced):
        args, kwargs = jax.tree.unflatten(tree, [traced.get(i, value) for i, value in enumerate(values)])
        own = {**others, "params": meta.replace_boxed(variables["params"], params)}
        rngs = {"params": key, "dropout": key}
        with nn.intercept_methods(watch.intercept):
            entry = watch.own.entering(model)
            return model.apply(own, *args, rngs=rngs, mutable=list(others), method=entry, **kwargs)

    others = {name: value for name, value in variables.items() if name != "params"}
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(run)(params, others, key, traced).jaxpr
    paths = [tuple(entry.key for entry in path) for path, _ in jax.tree.leaves_with_path(params)]
    origins: list[Origin | None] = [
        Origin(path, tuple(range(var.aval.ndim))) for path, var in zip(paths, program.invars, strict=False)
    ]
    walk = Walk()
    walk.follow(program, origins + [None] * (len(program.invars) - len(paths)))
    return walk.seen, walk.used
