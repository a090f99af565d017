"""From names and patterns to the sites of a model: every pattern must hit, no site may be claimed twice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mor_jax.adapters import Adapter

ALL_LINEAR = "all-linear"


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


@dataclass(frozen=True)
class Candidates:
    """What a model has to adapt, by path.

    Attributes:
        linear: Its linear maps, in the model's order.
        heads: Those of them that are output heads.
        failed: Linear modules that are not one linear map, and why.
        unknown: Other modules that hold matrices, and what they are.
    """

    linear: tuple[str, ...]
    heads: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def select(self, pattern: str) -> list[str]:
        """Paths of the linear maps that ``pattern`` stands for.

        Raises:
            InjectionError: if there are none, or a module is named that is not one linear map.
        """
        if pattern == ALL_LINEAR:
            hits = [p for p in self.linear if p not in self.heads]
            left = {**self.unknown, **self.failed, **dict.fromkeys(self.heads, "is an output head")}
        else:
            hits = [p for p in self.linear if matches(pattern, p)]
            left = {path: why for path, why in self.unknown.items() if matches(pattern, path)}
            for path, why in self.failed.items():
                if matches(pattern, path):
                    raise InjectionError(f"target {pattern!r} matches {path}, which can't be adapted: {why}")
        if not hits:
            for path, why in left.items():
                verb = "finds nothing to adapt: it leaves out" if pattern == ALL_LINEAR else "matches"
                raise InjectionError(f"target {pattern!r} {verb} {path or 'the model itself'}, which {why}")
            raise InjectionError(f"target {pattern!r} matches no linear module; {nearest_names(pattern, self.linear)}")
        return hits


def assign_adapters(
    candidates: Candidates,
    adapter: Adapter,
    targets: tuple[str, ...],
    overrides: tuple[tuple[str, Adapter], ...],
) -> dict[str, Adapter]:
    """Which adapter each site gets, in the model's order.

    Args:
        candidates: What the model has.
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
        chosen |= dict.fromkeys(candidates.select(pattern), adapter)
    claimed: dict[str, tuple[str, Adapter]] = {}
    for pattern, other in overrides:
        for path in candidates.select(pattern):
            before = claimed.setdefault(path, (pattern, other))
            if before[1] != other:
                raise InjectionError(
                    f"{path} is claimed by two overrides with different settings: {before[0]!r} and {pattern!r}; "
                    "make one of them narrower"
                )
            chosen[path] = other
    return {path: chosen[path] for path in candidates.linear if path in chosen}


def left_out(candidates: Candidates, targets: tuple[str, ...], chosen: Iterable[str]) -> dict[str, str]:
    """{path: why} of what the targets might have meant and did not get.

    Modules that failed always; with "all-linear" heads and unknown modules too; else unknown ones that a target names
    beside linear maps.
    """
    found = dict(candidates.failed)
    for path, why in {**dict.fromkeys(candidates.heads, "is an output head"), **candidates.unknown}.items():
        if ALL_LINEAR in targets or any(path in candidates.unknown and matches(target, path) for target in targets):
            found[path] = why
    return {path: why for path, why in found.items() if path not in set(chosen)}
