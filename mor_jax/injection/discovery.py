"""Tracing a model once: which of its modules are linear maps, how they contract, and what else holds matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from mor_jax.injection.heads import heads_by_output, remember_output
from mor_jax.injection.linear import Contraction, LinearKind, find_kind, first_argument
from mor_jax.injection.scopes import OwnModules
from mor_jax.injection.stacking import Stack, leave_mark, read_stack, without_marks

_MAKE_KERNELS = (nn.WeightNorm, nn.SpectralNorm)


@dataclass(frozen=True)
class Visit:
    """The first call of a linear module.

    Attributes:
        kind: What it is.
        shape: Of its kernel.
        contraction: How it contracts; None where that is not one linear map.
        error: Why not.
        x: What it read.
        out_features: Size of the produced axes.
    """

    kind: LinearKind
    shape: tuple[int, ...]
    contraction: Contraction | None
    error: str
    x: Any

    def shares(self, other: Visit) -> bool:
        """Whether both read the identical x, along the last axis alone."""
        ours, theirs = self.contraction, other.contraction
        if ours is None or theirs is None:
            return False
        both = ours.contracts_last_axis(self.x.ndim) and theirs.contracts_last_axis(other.x.ndim)
        return self.x is other.x and both


@dataclass(frozen=True)
class Unknown:
    """Why a module that holds matrices is no linear module; ``ordinary`` where nobody expects it to be."""

    reason: str
    ordinary: bool = False


@dataclass
class Discovery:
    """An interceptor that records the modules of one run, and afterwards what was found.

    Attributes:
        kinds: The table of linear modules.
        blocks: Patterns of modules whose input may decide a gate.
        visits: By path, every linear module that was called.
        widths: Size of the last axis of every module's first array.
        classes: The class of every module.
        ndims: Axes of every parameter where its module reads it, by path.
        read: What every module was called with, arrays by identity.
        params: The shapes of the parameters, marks among them.
        made_from: Classes of the open calls that make the kernels of the modules within from their parameters.
        heads: Paths of linear modules whose output is the model's.
    """

    kinds: tuple[LinearKind, ...]
    blocks: tuple[str, ...] = ()
    visits: dict[str, Visit] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)
    ndims: dict[str, int] = field(default_factory=dict)
    read: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    made_from: list[str] = field(default_factory=list)
    own: OwnModules = field(default_factory=OwnModules)

    def intercept(self, next_fun, args, kwargs, context):
        """Records each module's visit."""
        module = context.module
        with self.own.call(module) as path:
            if path is None:
                return next_fun(*args, **kwargs)
            self.classes[path] = type(module)
            if context.method_name != "__call__":
                output = next_fun(*args, **kwargs)
                self._note_axes(path, module)
                return output
            arrays = tuple(value for value in jax.tree.leaves((args, kwargs)) if hasattr(value, "shape"))
            self.read.setdefault(path, arrays)
            made = isinstance(module, _MAKE_KERNELS)
            self.made_from += [type(module).__name__] * made
            output = next_fun(*args, **kwargs)
            del self.made_from[len(self.made_from) - made :]
            self._note_axes(path, module)
            return self._record(path, module, args, kwargs, output)

    def _note_axes(self, path: str, module: nn.Module) -> None:
        """The module's own parameters as it sees them; inside of a scan that comes before what the scan hands out."""
        for name, value in module.variables.get("params", {}).items():
            if not isinstance(value, Mapping) and hasattr(meta.unbox(value), "ndim"):
                self.ndims.setdefault(f"{path}/{name}".lstrip("/"), meta.unbox(value).ndim)

    def _record(self, path: str, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        x = first_argument(args, kwargs)
        if getattr(x, "ndim", 0):
            self.widths.setdefault(path, x.shape[-1])
        kind = find_kind(module, self.kinds)
        if self.made_from:
            if kind is not None:
                error = f"{self.made_from[-1]} makes its kernel from its parameters, and would change its adapter too"
                self.visits[path] = Visit(kind, (), None, error, x)
            return output
        if "params" in module.variables or any(re.fullmatch(block, path) for block in self.blocks):
            leave_mark(module)
        if kind is None or not hasattr(x, "shape"):
            return output
        visit, before = _visit(kind, module, args, kwargs, output), self.visits.get(path)
        if before is None or (not before.error and visit.error):
            self.visits[path] = visit
        elif before.contraction is not None and visit.contraction is not None:
            if _kernel_axes(before.contraction) != _kernel_axes(visit.contraction):
                error = "it is called in ways that contract different axes of its kernel, so no one adapter fits them"
                self.visits[path] = Visit(kind, visit.shape, None, error, x)
        return output if visit.error else remember_output(output, path)

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Runs ``model.init`` abstractly. Arguments that have a shape are traced, all others are static."""
        values, tree = jax.tree.flatten((args, kwargs))
        traced = {i: jax.ShapeDtypeStruct(v.shape, v.dtype) for i, v in enumerate(values) if hasattr(v, "shape")}
        entry = self.own.entering(model)

        def run(key, traced):
            args, kwargs = jax.tree.unflatten(tree, [traced.get(i, value) for i, value in enumerate(values)])
            with nn.intercept_methods(self.intercept):
                output, variables = model.init_with_output(
                    {"params": key, "dropout": key}, *args, method=entry, **kwargs
                )
            outputs = [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]
            counts.append(len(outputs))
            return outputs, variables.get("params", {})

        counts: list[int] = []
        key = jax.eval_shape(lambda: jax.random.key(0))
        program, (_, self.params) = jax.make_jaxpr(run, return_shape=True)(key, traced)
        widths = {path: self.out_features(path) for path, visit in self.visits.items() if visit.contraction is not None}
        self.heads = heads_by_output(program, counts[-1], widths, self._vocabularies())

    def stack(self, path: str) -> Stack:
        """How the parameters of the module at ``path`` are stacked."""
        return read_stack(self.params, tuple(path.split("/")) if path else ())

    def out_features(self, path: str) -> int:
        """Size of the produced axes of a linear module."""
        visit = self.visits[path]
        size = 1
        for axis in visit.contraction.out_axes if visit.contraction is not None else ():
            size *= visit.shape[axis]
        return size

    def matrices(self) -> dict[str, Unknown]:
        """{path of a module that holds matrices and is no linear module that was called: what it is instead}."""
        found = {}
        for path, leaves in _leaves_by_module(without_marks(self.params)).items():
            if path in self.visits:
                continue
            depth = len(self.stack(path).indices)
            shapes = {name: leaf.shape for name, leaf in leaves.items() if len(leaf.shape) - depth >= 2}
            if shapes:
                found[path] = _why_not(self._class_of(path), shapes)
        return found

    def _class_of(self, path: str) -> type:
        while path not in self.classes and path:
            path = path.rpartition("/")[0]
        return self.classes.get(path, nn.Module)

    def _vocabularies(self) -> set[int]:
        """The numbers of rows of the embedding tables."""
        sizes = set()
        for path, leaves in _leaves_by_module(without_marks(self.params)).items():
            for name, leaf in leaves.items():
                if path not in self.visits and "embed" in f"{path}/{name}".lower() and len(leaf.shape) == 2:
                    sizes.add(leaf.shape[0])
        return sizes


def _visit(kind: LinearKind, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Visit:
    """What is known of a call; whatever is wrong with it matters only where the module is a target."""
    x, shape = first_argument(args, kwargs), ()
    if _is_bridge(type(module)):
        return Visit(kind, shape, None, f"it is {_BRIDGED}", x)
    if not module.has_variable("params", kind.kernel_leaf):
        return Visit(kind, shape, None, f"it has no {kind.kernel_leaf!r} in the collection 'params'", x)
    try:
        shape = tuple(meta.unbox(module.get_variable("params", kind.kernel_leaf)).shape)
        contraction = kind.contract(module, args, kwargs, shape)
        contraction.check(x.shape, shape, output.shape)
    except Exception as error:  # a table of one's own may raise anything at a module that it was not made for
        told = (
            str(error) if isinstance(error, ValueError) else f"its contraction raised {type(error).__name__}: {error}"
        )
        return Visit(kind, shape, None, told, x)
    return Visit(kind, shape, contraction, "", x)


_BRIDGED = "an NNX module inside linen, to whose parameters nothing can be joined"


def _is_bridge(kind: type) -> bool:
    return any(base.__module__.startswith("flax.nnx") for base in kind.__mro__)


def _kernel_axes(contraction: Contraction) -> tuple[tuple[int, ...], ...]:
    return contraction.in_axes, contraction.out_axes, contraction.batch_axes


def _leaves_by_module(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """{path of a module: {name: its own arrays, out of their boxes}}."""
    own = {name: meta.unbox(leaf) for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    found = {"/".join(prefix): {name: leaf for name, leaf in own.items() if hasattr(leaf, "shape")}}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            found |= _leaves_by_module(child, (*prefix, name))
    return found


def _why_not(kind: type, shapes: Mapping[str, tuple[int, ...]]) -> Unknown:
    held = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    what = "holds a matrix but is no known linear module"
    for plain, word in (
        (nn.Embed, "an embedding table"),
        (nn.Conv, "a convolution"),
        (nn.ConvTranspose, "a convolution"),
    ):
        if issubclass(kind, plain):
            return Unknown(f"{what}, and no LinearKind fits it: {word} ({held})", ordinary=True)
    if _is_bridge(kind):
        return Unknown(f"{what}: {_BRIDGED} ({held})")
    return Unknown(f"{what}: {kind.__name__} with {held}; register its class with a LinearKind")
