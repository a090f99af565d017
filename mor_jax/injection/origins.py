"""Where the parameters of a model go in its traced program: what its modules see, and what else reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

BEGIN, END = "mor_jax begin of ", "mor_jax end of "  # names of a site's kernel where a call begins and where it ends
_UNCHANGED = ("name", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "reshard", "pvary", "pcast")


@dataclass(frozen=True)
class Origin:
    """A stored parameter that a value equals, and which of its axes, in order, are the value's."""

    path: tuple[str, ...]
    axes: tuple[int, ...]

    def is_stored(self, path: tuple[str, ...], stack_positions: tuple[int, ...]) -> bool:
        """Whether it is that parameter, or one layer of it, its axes in the order in which they are stored."""
        own = [axis for axis in self.axes if axis not in stack_positions]
        return self.path == path and own == sorted(own)


@dataclass
class _Frame:
    """An open call of a site."""

    path: str
    used: set[tuple[str, ...]] = field(default_factory=set)  # parameters that it computes with
    of_parent: bool = False  # whether it calls its parent class's __call__, which is the site's call then


@dataclass
class Walk:
    """Where the parameters go in a program: under which names, and in which sites' calls they are computed with."""

    seen: dict[str, list[Origin | None]] = field(default_factory=dict)
    used: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    running: list[_Frame] = field(default_factory=list)  # the innermost last

    def follow(self, program: Jaxpr, inputs: Sequence[Origin | None]) -> list[Origin | None]:
        """The origins of a program's outputs."""
        origins: dict[Any, Origin | None] = dict(zip(program.invars, inputs, strict=True))
        for equation in program.eqns:
            given = [_origin_of(value, origins) for value in equation.invars]
            found = self._outputs(equation, given)
            origins.update(zip(equation.outvars, found, strict=True))
        return [_origin_of(value, origins) for value in program.outvars]

    def _outputs(self, equation: Any, given: list[Origin | None]) -> list[Origin | None]:
        name, options, count = equation.primitive.name, equation.params, len(equation.outvars)
        if name == "name":
            self._read_name(options["name"], given[0])
        if name in _UNCHANGED or (name == "convert_element_type" and _stays_floating(equation)):
            return given[:count]
        if name == "transpose" and given[0] is not None:
            return [Origin(given[0].path, tuple(given[0].axes[axis] for axis in options["permutation"]))]
        found: list[Origin | None] = [None] * count
        programs = list(_inner_programs(name, options, given))
        for inner, own in programs:
            outputs = self.follow(inner, own)
            if name not in ("scan", "while", "cond") and len(outputs) == count:
                found = outputs
        if not programs:
            self._use({origin.path for origin in given if origin is not None})
        return found

    def _use(self, parameters: set[tuple[str, ...]]) -> None:
        if self.running:
            self.running[-1].used |= parameters
        else:
            self._note("", parameters)

    def _note(self, site: str, parameters: set[tuple[str, ...]]) -> None:
        for parameter in parameters:
            self.used.setdefault(parameter, set()).add(site)

    def _read_name(self, name: str, origin: Origin | None) -> None:
        self.seen.setdefault(name, []).append(origin)
        if name.startswith(BEGIN):
            path = name.removeprefix(BEGIN)
            for frame in self.running:
                frame.of_parent |= frame.path == path
            self.running.append(_Frame(path))
        elif name.startswith(END):
            frame = self.running.pop()
            self._note("" if frame.of_parent else frame.path, frame.used)


def _origin_of(value: Any, origins: Mapping[Any, Origin | None]) -> Origin | None:
    return None if isinstance(value, Literal) else origins.get(value)


def _stays_floating(equation: Any) -> bool:
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (equation.invars[0], equation.outvars[0]))


def _inner_programs(name: str, options: Mapping[str, Any], given: list) -> Iterator[tuple[Jaxpr, list]]:
    """The programs inside of an operation with the origins of their inputs: unknown ones where they do not fit."""
    for value in options.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            if not isinstance(inner, Jaxpr):
                continue
            own = given[1:] if name == "cond" else given
            if name == "scan":
                whole = options["num_consts"] + options["num_carry"]
                layers = [None if o is None else Origin(o.path, o.axes[1:]) for o in given[whole:]]
                own = given[: options["num_consts"]] + [None] * options["num_carry"] + layers
            count = len(inner.invars)
            yield inner, own if len(own) == count and name != "while" else [None] * count
