"""Where a linear module lies in the depth of the model: layers that are modules of their own, told by their numbers."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from mor_jax.injection.discovery import Discovery

_NUMBER = re.compile(r"(?:^|_|/)(\d+)(?=/)")  # as in layers_3/mlp/up_proj and layer/3/mlp/up_proj
_BESIDE = re.compile(r"expert|branch|tower")  # modules of such names lie side by side, whatever their numbers


@dataclass(frozen=True)
class Place:
    """Where a module lies.

    Attributes:
        chain: Its path without the number of its layer.
        first: Place in depth of the first of its layers.
        depth: Layers of all modules that differ from it in the number alone; 0 for a path without a number.
    """

    chain: str
    first: int = 0
    depth: int = 0


def depth_of(path: str, found: Discovery) -> Place:
    """The place of a linear module among those whose paths differ in the number of their layer alone."""
    for number in _NUMBER.finditer(path):
        start, end = path[: number.start(1)], path[number.end(1) :]
        same = re.compile(re.escape(start) + r"(\d+)" + re.escape(end))
        numbers = sorted(int(match[1]) for match in map(same.fullmatch, found.visits) if match)
        if _side_by_side([f"{start}{n}" for n in numbers], found):
            continue
        layers = {n: _layers(f"{start}{n}{end}", found) for n in numbers}
        own = int(number[1])
        first = sum(count for n, count in layers.items() if n < own)
        return Place(start.rstrip("_/") + end, first, sum(layers.values()))
    return Place(path)


def _side_by_side(blocks: list[str], found: Discovery) -> bool:
    """Whether modules that differ in a number are no layers: two of them read the identical arrays (experts do)."""
    if _BESIDE.search(blocks[0].rpartition("/")[2].lower()):
        return True
    read = [found.read[block] for block in blocks if found.read.get(block)]
    return any(
        len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))
        for one, two in itertools.combinations(read, 2)
    )


def _layers(path: str, found: Discovery) -> int:
    """How many layers scans stack into the parameters of the module at ``path``."""
    visit, tree = found.visits[path], found.params
    for name in (*path.split("/"), visit.kind.kernel_leaf):
        tree = tree.get(name, {})
    shape, count = getattr(tree, "shape", ()), 1
    for position, layers in found.stack(path).placed(len(visit.shape)):
        if layers is not False and position < len(shape):
            count *= shape[position]
    return count
