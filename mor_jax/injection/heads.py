"""Which linear module is a model's output head: by what it is called, or because its output is the model's logits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

_OUTPUT = "mor_jax output of "
_PREFIX = "lm|mlm|nsp|cls|classification|output|prediction|regression|value|reward|score|vocab|decoder|pretraining|qa"
_NAMES = re.compile(
    rf"(?:(?:{_PREFIX})_?)?heads?|(?:(?:to|final|output|vocab)_?)?logits?(?:_?(?:dense|linear|fc|proj|projection|layer))?"
    r"|classifier|score|unembed(?:ding)?|embed_out|vocab_proj(?:ection)?"
)
# Behind these a value is another one: a product of the head's output is not the model's logits.
_OTHER_VALUE = ("dot_general", "ragged_dot", "conv_general_dilated", "scan", "while", "cond", "sort", "custom_call")
_PARTS = ("gather", "dynamic_slice", "slice")  # of logits they are logits; of a table they look something up


class _OtherValue(Exception):
    """A value depends on something else than one module's output and constants."""


def named_as_head(path: str) -> bool:
    """Whether a part of the path is what output heads are called, in any spelling (``lm_head``, ``LogitsDense``)."""
    parts = (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in path.split("/"))
    return any(_NAMES.fullmatch(re.sub(r"_\d+$", "", part)) for part in parts)


def remember_output(output: Any, path: str) -> Any:
    """The output of a module, to be found again in the traced program."""
    return checkpoint_name(output, _OUTPUT + path) if hasattr(output, "dtype") else output


def heads_by_output(program: Any, num_outputs: int, widths: Mapping[str, int], vocabularies: Iterable[int]) -> set[str]:
    """Paths whose output, but for changes of each entry (scaling, soft caps, masks), is one of the model's outputs.

    Args:
        program: Closed jaxpr of a run in which every linear module's output was remembered.
        num_outputs: How many of its first outputs are the model's.
        widths: {path of a linear module: its outputs}.
        vocabularies: Sizes of the model's embedding tables; what puts out another number of values is no head.
    """
    jaxpr, sizes, found = program.jaxpr, set(vocabularies), set()
    for variable in jaxpr.outvars[:num_outputs]:
        if isinstance(variable, Literal) or not variable.aval.shape or variable.aval.shape[-1] not in sizes:
            continue
        try:
            paths = _Walk(jaxpr, {}).sources(variable)
        except _OtherValue:
            continue
        if len(paths) == 1 and widths.get(next(iter(paths))) in sizes:
            found |= paths
    return found


class _Walk:
    """From a variable of a program back to the modules whose outputs it is made of."""

    def __init__(self, jaxpr: Any, inputs: Mapping[Any, Any]):
        self.inputs = inputs  # variable of an inner program -> (walk, variable) of the one around it
        self.made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
        self.known: dict[Any, set[str]] = {}

    def sources(self, variable: Any) -> set[str]:
        """Paths of the modules; nothing for constants and for the model's arguments."""
        if isinstance(variable, Literal):
            return set()
        if variable not in self.known:
            self.known[variable] = self._found(variable)
        return self.known[variable]

    def _found(self, variable: Any) -> set[str]:
        if variable in self.inputs:
            walk, outer = self.inputs[variable]
            return walk.sources(outer)
        equation = self.made.get(variable)
        if equation is None:
            return set()
        name = equation.primitive.name
        if name == "name" and equation.params["name"].startswith(_OUTPUT):
            return {equation.params["name"].removeprefix(_OUTPUT)}
        if name in _OTHER_VALUE:
            raise _OtherValue
        if name in _PARTS:
            whole = self.sources(equation.invars[0])
            if not whole and name != "slice":
                raise _OtherValue
            return whole
        inner = _inner_program(equation)
        if inner is None:
            return set().union(*map(self.sources, equation.invars))
        if len(inner.invars) != len(equation.invars):
            raise _OtherValue
        given = {own: (self, outer) for own, outer in zip(inner.invars, equation.invars, strict=True)}
        return _Walk(inner, given).sources(inner.outvars[equation.outvars.index(variable)])


def _inner_program(equation: Any) -> Any:
    """The program that an equation (of jit, remat, a custom derivative) runs once, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = equation.params.get(name)
        if found is not None:
            return getattr(found, "jaxpr", found)
    return None
