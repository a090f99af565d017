"""Which axes flax's lifted transformations add to a module's parameters, and which of them are layers.

A mark beside the parameters is told of every axis that ``nn.scan`` or ``nn.vmap`` adds, in order (flax's
``AxisMetadata``); the scope's ``debug_path`` tells the transformations in order. What a scan adds are layers, one after
the other; what a vmap adds lies side by side (experts), unless its ``nn.PARTITION_NAME`` says otherwise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

MARK = "layer_axes"
_MOST_AXES = 6  # of a kernel: a mark has as many, so that it can be stacked along any of theirs
_LAYERS, _EXPERTS = re.compile("layer|stage|block"), re.compile("expert|head|ensemble")


@dataclass(frozen=True)
class Mark(meta.AxisMetadata):
    """A value that remembers the axes added to it.

    Attributes:
        value: Array of nothing.
        transforms: The mapping transformations around it, outermost first: "scan" or "vmap".
        axes: Index and partition name of each axis that was added, innermost first.
    """

    value: Any
    transforms: tuple[str, ...] = ()
    axes: tuple[tuple[int, str], ...] = ()

    def unbox(self) -> Any:
        """The array."""
        return self.value

    def replace_boxed(self, val: Any) -> Mark:
        """The same mark around another array."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Mark:
        """With one more axis, where the array has it: ``nn.add_metadata_axis`` tells of one that is not there."""
        if self.value.ndim <= _MOST_AXES + len(self.axes):
            return self
        name = str((params or {}).get(nn.PARTITION_NAME) or "")
        return dataclasses.replace(self, axes=(*self.axes, (index, name)))

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Mark:
        """As it is: what runs inside reads no marks, and ``add_axis`` follows, which knows the axis already."""
        return self


# Models that walk over their parameters by name expect dictionaries, so a mark's path is one of a dictionary.
jax.tree_util.register_pytree_with_keys(
    Mark,
    lambda mark: (((jax.tree_util.DictKey("value"), mark.value),), (mark.transforms, mark.axes)),
    lambda fields, values: Mark(next(iter(values)), *fields),
)


def leave_mark(module: nn.Module) -> None:
    """Puts a mark beside the parameters of ``module``, which is being called, once."""
    scope: Any = module.scope
    if not scope.is_mutable_collection("params") or scope.has_variable("params", MARK):
        return
    around = [name for part in scope.debug_path for name in reversed(re.findall(r"(\w+)\(", part))]
    transforms = tuple(name for name in around if name in ("scan", "vmap"))
    scope.put_variable("params", MARK, Mark(jnp.zeros((1,) * _MOST_AXES, bool), transforms))


@dataclass(frozen=True)
class Stack:
    """The axes that were added to a module's parameters, innermost first.

    Attributes:
        indices: Where each was inserted, as the transformation says it, negative or not.
        layers: Whether each is one of layers; None where that can't be told.
    """

    indices: tuple[int, ...] = ()
    layers: tuple[bool | None, ...] = ()

    def placed(self, ndim: int) -> tuple[tuple[int, bool | None], ...]:
        """(position, whether of layers) of each in a stored parameter whose own axes are ``ndim``, by position."""
        labels: list[int | None] = [None] * ndim
        for number, index in enumerate(self.indices):
            labels.insert(index % (len(labels) + 1), number)
        return tuple((place, self.layers[number]) for place, number in enumerate(labels) if number is not None)


def read_stack(params: Mapping[str, Any], path: tuple[str, ...]) -> Stack:
    """The stack of the module at ``path``, from its mark and those of the modules around it."""
    marks, tree = [params.get(MARK)], params
    for name in path:
        tree = tree.get(name, {})
        marks.append(tree.get(MARK) if isinstance(tree, Mapping) else None)
    known = [mark for mark in marks if isinstance(mark, Mark)]
    layers: list[bool | None] = []
    for number, mark in enumerate(known):  # from outside in: what each mark has beyond the one around it
        before = known[number - 1] if number else Mark(None)
        axes = mark.axes[: len(mark.axes) - len(before.axes)][::-1]
        kinds = _kinds(mark.transforms[len(before.transforms) :], len(axes))
        layers += [_named(name, kind) for (_, name), kind in zip(axes, kinds, strict=True)]
    last = known[-1].axes if known else ()
    return Stack(tuple(index for index, _ in last), tuple(reversed(layers)))


def _kinds(transforms: tuple[str, ...], count: int) -> list[str | None]:
    """The transformation of each of ``count`` axes; None where more transformations than axes leave a choice."""
    if len(transforms) == count:
        return list(transforms)
    return [transforms[0] if len(set(transforms)) == 1 else None] * count


def _named(name: str, kind: str | None) -> bool | None:
    if _EXPERTS.search(name.lower()):
        return False
    if _LAYERS.search(name.lower()):
        return True
    return None if kind is None else kind == "scan"


def without_marks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without the marks."""
    return {
        name: without_marks(child) if isinstance(child, Mapping) else child
        for name, child in tree.items()
        if name != MARK
    }
