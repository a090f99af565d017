"""From names and patterns to the sites of a model: every pattern must hit, no site may be claimed twice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from mor_jax.adapters import Adapter

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("lm_head", "head", "logits", "classifier", "score")


class InjectionError(ValueError):
    """Targets, overrides or trained modules that do not fit the model; the message names them and the nearest."""


def matches(pattern: str, path: str) -> bool:
    """Whether a name (``q_proj``, ``self_attn.q_proj``) ends the path, or a regular expression is all of it."""
    name = pattern.replace(".", "/")
    if re.fullmatch(r"[\w/]+", name):
        return path == name or path.endswith("/" + name)
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise InjectionError(f"target {pattern!r} is no valid regular expression: {error}") from error


def nearest_names(pattern: str, paths: Iterable[str]) -> str:
    """A sentence with the names closest to ``pattern``."""
    names = sorted({p.rsplit("/", 1)[-1] for p in paths} | set(paths))
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or sorted({p.rsplit("/", 1)[-1] for p in paths})
    return f"nearest: {', '.join(near[:12])}"


def _select(pattern: str, paths: Iterable[str], unknown: Iterable[str]) -> list[str]:
    if pattern == ALL_LINEAR:
        hits = [p for p in paths if not set(p.split("/")) & set(HEAD_NAMES)]
    else:
        hits = [p for p in paths if matches(pattern, p)]
    if not hits:
        held = [p for p in unknown if pattern != ALL_LINEAR and matches(pattern, p)]
        if held:
            raise InjectionError(
                f"target {pattern!r} matches {held[0]}, which holds a matrix but is no known linear module; "
                "register its class with a LinearKind"
            )
        raise InjectionError(f"target {pattern!r} matches no linear module; {nearest_names(pattern, paths)}")
    return hits


def assign_adapters(
    paths: list[str],
    unknown: list[str],
    adapter: Adapter,
    targets: tuple[str, ...],
    overrides: tuple[tuple[str, Adapter], ...],
) -> dict[str, Adapter]:
    """Which adapter each site gets, in the model's order.

    Args:
        paths: Paths of the model's linear modules.
        unknown: Paths of other modules that hold one matrix.
        adapter: The method of every target that no override names.
        targets: Names, regular expressions or "all-linear".
        overrides: (pattern, method) pairs; a pattern may also name a site that ``targets`` leaves out.

    Raises:
        InjectionError: if a pattern hits nothing, or two overrides claim one site for different methods.
    """
    if not targets:
        raise InjectionError(f"no targets given; name modules or use {ALL_LINEAR!r}")
    chosen: dict[str, Adapter] = {}
    for pattern in targets:
        chosen |= dict.fromkeys(_select(pattern, paths, unknown), adapter)
    claimed: dict[str, tuple[str, Adapter]] = {}
    for pattern, other in overrides:
        for path in _select(pattern, paths, unknown):
            before = claimed.setdefault(path, (pattern, other))
            if before[1] != other:
                raise InjectionError(
                    f"{path} is claimed by two overrides with different settings: {before[0]!r} and {pattern!r}; "
                    "make one of them narrower"
                )
            chosen[path] = other
    return {path: chosen[path] for path in paths if path in chosen}
