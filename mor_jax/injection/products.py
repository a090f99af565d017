"""Which linear modules are x @ kernel + bias, and why others are not.

An adapter is added to a module's output whatever the module does. But folding it into the kernel is right only where
the module multiplies by the kernel and does nothing else: scales, clips, quantises or masks nothing. Flax's own modules
with their own arithmetic are known. Any other is called alone on whole numbers, and its program is examined: it must be
linear in x and in its parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList, meta

from mor_jax.injection.linear import DEFAULT_KINDS, Contraction, LinearKind, first_argument

RESERVED = "adapter"
ARITHMETIC = ("dot_general", "dot_general_cls", "promote_dtype", "preferred_element_type")
PLAIN = (nn.Dense, nn.DenseGeneral, nn.Einsum)


def is_product(module: nn.Module, kind: LinearKind, kernel: Any) -> bool:
    """Whether a call of ``module`` surely is x @ kernel + bias, formed as jax forms it by default.

    Args:
        module: Any module of ``kind``.
        kind: One of the table.
        kernel: The kernel that it sees.
    """
    usual = _has_usual_arithmetic(module, (*ARITHMETIC, "precision"))
    return type(module) in PLAIN and kind in DEFAULT_KINDS and usual and jnp.issubdtype(kernel.dtype, jnp.floating)


def _has_usual_arithmetic(module: nn.Module, names: tuple[str, ...]) -> bool:
    fields = {f.name: f.default for f in dataclasses.fields(module)}
    return all(getattr(module, name) is fields[name] for name in names if name in fields)


@dataclass
class Call:
    """One module's call as it was traced: the module apart from its model, shapes in the place of arrays.

    A class that calls its parent's ``__call__`` is called twice: this is the parent's call, which gets the adapter.
    """

    module: nn.Module
    owner: type  # the class whose __call__ it is
    kind: LinearKind
    contraction: Contraction
    variables: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call_of(
    module: nn.Module, method: Any, kind: LinearKind, args: tuple, kwargs: Mapping[str, Any], shape: tuple[int, ...]
) -> Call:
    """A call of ``module`` by a bound ``method`` of it, with a kernel of ``shape``."""
    called = getattr(method, "func", None)
    methods = {owner: owner.__dict__.get("__call__") for owner in type(module).__mro__}
    owners = (owner for owner, own in methods.items() if own and getattr(own, "__wrapped__", own) is called)
    contraction = kind.contract(module, args, kwargs, shape)
    variables, args, kwargs = jax.tree.map(shape_of, (dict(module.variables), args, dict(kwargs)))
    variables["params"] = {k: v for k, v in variables["params"].items() if k != RESERVED}
    alone = module.clone(parent=None)
    return Call(alone, next(owners, type(module)), kind, contraction, variables, args, kwargs)


def shape_of(value: Any) -> Any:
    """The shape of an array; anything else as it is."""
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if hasattr(value, "shape") else value


def first_line(error: Exception) -> str:
    """What an error says, shortly."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def why_no_product(call: Call, known: dict[str, str]) -> str:
    """Why the module's own call is no product with its kernel, or ""; each module of one kind and size is run once."""
    kernel = meta.unbox(call.variables["params"][call.kind.kernel_leaf])
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return f"its kernel is stored as {kernel.dtype}, in which a change would be rounded away"
    if call.owner in PLAIN and call.kind in DEFAULT_KINDS and _has_usual_arithmetic(call.module, ARITHMETIC):
        return ""
    key = repr(call)
    if key not in known:
        try:
            with jax.ensure_compile_time_eval():
                known[key] = _examine(call)
        except Exception as error:  # whatever somebody's module wants that is not here
            known[key] = f"its call could not be examined alone ({first_line(error)})"
    return known[key]


def _examine(call: Call) -> str:
    """Why the call differs from x @ kernel + bias, or ""."""
    leaf, bias_leaf = call.kind.kernel_leaf, call.kind.bias_leaf
    values, tree = jax.tree.flatten((call.args, call.kwargs))
    arrays = [i for i, v in enumerate(values) if hasattr(v, "shape")]
    params, others = meta.unbox(call.variables["params"]), {k: v for k, v in call.variables.items() if k != "params"}
    first, contraction = first_argument(call.args, call.kwargs), call.contraction
    place = next(i for i in arrays if values[i] is first)
    contracted = math.prod(params[leaf].shape[axis] for axis in contraction.in_axes)
    whole = _WholeNumbers(share=min(1.0, 1024 / contracted))
    params = jax.tree.map(whole.draw, params)
    others = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), others)
    filled = {i: whole.draw(_few_rows(values[i], contraction) if len(arrays) == 1 else values[i]) for i in arrays}
    x = filled.pop(place)

    def run(params: Any, x: Any) -> Any:
        given = {**filled, place: x}
        args, kwargs = jax.tree.unflatten(tree, [given.get(i, value) for i, value in enumerate(values)])
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        own, lists = {**others, "params": params}, DenyList("params")
        return call.module.apply(own, *args, method=call.owner.__call__, rngs=rngs, mutable=lists, **kwargs)[0]

    y = run(params, x)
    bias = {name: value for name, value in params.items() if name != leaf}
    if not _is_linear(lambda own: run(own, x), params):
        return "it does more with its kernel than multiply x by it"
    if not _is_linear(lambda own: run({**own[0], leaf: params[leaf]}, own[1]), (bias, x)):
        return "it does more with x than multiply it by its kernel"
    expected = _product(contraction, x, params[leaf], y)
    if bias_leaf in params:
        expected = expected + np.asarray(contraction.place_bias(params[bias_leaf], y.ndim), np.float64)
    same = np.allclose(np.asarray(y, np.float64), expected, rtol=float(jnp.finfo(y.dtype).eps), atol=1e-3)
    if same:
        return ""
    return "its output is not x @ kernel + bias (scaled, masked, along other axes, or with a bias that its kind omits)"


@dataclass
class _WholeNumbers:
    """Draws -1, 0 and 1, so seldom other than 0 that sums of products are exact in bfloat16 too."""

    share: float
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def draw(self, shape: Any) -> jax.Array:
        signs = self.generator.integers(0, 2, shape.shape, np.int8) * 2 - 1
        kept = self.generator.random(shape.shape, np.float32) < self.share
        return jnp.asarray(np.where(kept, signs, 0), shape.dtype)


def _few_rows(x: jax.ShapeDtypeStruct, contraction: Contraction) -> jax.ShapeDtypeStruct:
    """X with no more than two entries along each axis that is neither contracted nor one of several maps."""
    whole = [axis % len(x.shape) for axis in contraction.x_axes + contraction.x_batch_axes]
    return jax.ShapeDtypeStruct([n if i in whole else min(n, 2) for i, n in enumerate(x.shape)], x.dtype)


def _product(contraction: Contraction, x: Any, kernel: Any, y: Any) -> np.ndarray:
    """X @ kernel in float64, map by map, in the shape of the output y."""
    parts = (contraction.batch_axes, contraction.in_axes, contraction.out_axes)
    sizes = [math.prod(kernel.shape[a] for a in axes) for axes in parts]
    order = [a % kernel.ndim for axes in parts for a in axes]
    maps = np.transpose(np.asarray(kernel, np.float64), order).reshape(sizes)
    rows = np.asarray(contraction.flatten_input(x), np.float64).reshape(sizes[0], -1, sizes[1])
    product = (rows @ maps).reshape(*contraction.kept_shape(x.shape), sizes[2])
    return np.asarray(contraction.restore_output(jnp.asarray(product), y), np.float64)


def _is_linear(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether a function is made of linear operations alone: whether jax can transpose it."""
    shapes = jax.tree.map(shape_of, argument)
    try:
        jax.eval_shape(jax.linear_transpose(function, shapes), jax.eval_shape(function, shapes))
    except Exception:  # each operation has its own way to say that it is not linear
        return False
    return True
