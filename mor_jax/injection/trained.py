"""Base modules that are trained whole: which they are, and how many axes their leaves have in one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.core import meta

from mor_jax.injection.targets import InjectionError, matches, nearest_names


def get_path(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The subtree at ``path``."""
    for name in path:
        tree = tree[name]
    return tree


def trained_shapes(
    modules: tuple[str, ...], params: Mapping[str, Any], sites: list[str]
) -> tuple[tuple[str, int], ...]:
    """(path, numbers) of every module that one of the names or patterns ``modules`` hits.

    Raises:
        InjectionError: if a pattern hits nothing, or a module that holds one of the ``sites``.
    """
    paths = ["/".join(p) for p in _module_paths(params)]
    sizes = []
    for pattern in modules:
        hits = [p for p in paths if matches(pattern, p)]
        if not hits:
            raise InjectionError(f"trained module {pattern!r} matches nothing; {nearest_names(pattern, paths)}")
        for hit in hits:
            inside = [s for s in sites if s == hit or s.startswith(hit + "/")]
            if inside:
                raise InjectionError(f"{inside[0]} is both a target and a trained module; choose one")
            leaves = jax.tree.leaves(meta.unbox(get_path(params, tuple(hit.split("/")))))
            sizes.append((hit, sum(math.prod(leaf.shape) for leaf in leaves)))
    return tuple(sizes)


def trained_ndims(
    modules: Iterable[str], params: Mapping[str, Any], ndims: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    """(path of a leaf, its axes in one layer) for all leaves of the modules.

    Args:
        modules: Paths of modules.
        params: The base parameters, or their shapes.
        ndims: Axes that a leaf had where its module read it; a leaf that is missing has those that it is stored with.
    """
    found = []
    for module in modules:
        tree = meta.unbox(get_path(params, tuple(module.split("/"))))
        for keys, leaf in jax.tree.leaves_with_path(tree):
            path = f"{module}/{jax.tree_util.keystr(keys, simple=True, separator='/')}"
            found.append((path, ndims.get(path, leaf.ndim)))
    return tuple(found)


def _module_paths(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    children = [(name, child) for name, child in tree.items() if isinstance(child, Mapping)]
    return ([prefix] if prefix else []) + [p for n, c in children for p in _module_paths(c, (*prefix, n))]
