"""What the steps compiled for slices are to reach, and whether the rows that were measured do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

GIB = 2**30
Rows = Mapping[tuple[str, str], dict]  # by case and method


class Target(NamedTuple):
    """One line of the table.

    Attributes:
      text: what is to be reached.
      judge: the rows -> (what was found, whether it is reached); raises KeyError where a row is missing.
    """

    text: str
    judge: Callable[[Rows], tuple[str, bool]]


def _memory(case: str, limit: float) -> Callable[[Rows], tuple[str, bool]]:
    """MoR's peak within `limit` GiB, or within the chip where that is 0; no stacked parameter whole on a chip."""

    def judge(rows: Rows) -> tuple[str, bool]:
        row = rows[case, "mor"]
        peak, stacks = row["peak_bytes_per_device"] / GIB, row["gathered_stacks"]
        found = f"{peak:.2f} GiB" + (f", gathers {', '.join(stacks)}" if stacks else "")
        return found, row["fits"] and not stacks and peak <= (limit or row["capacity_bytes"] / GIB)

    return judge


def _ratio(case: str, name: str, limit: float) -> Callable[[Rows], tuple[str, bool]]:
    def judge(rows: Rows) -> tuple[str, bool]:
        found = rows[case, "mor"][name] / rows[case, "lora"][name]
        return f"{found:.3f}", found <= limit

    return judge


def _weak_scaling(rows: Rows) -> tuple[str, bool]:
    found = rows["8b-64", "mor"]["estimated_seconds"] / rows["8b", "mor"]["estimated_seconds"]
    return f"{found:.3f}", abs(found - 1) <= 0.1


def _share(rows: Rows) -> tuple[str, bool]:
    row = rows["8b", "mor"]
    found = row["trained_bytes"] / row["base_bytes"]
    return f"{found:.2%}", found <= 0.01


_PEAK, _SECONDS = "peak_bytes_per_device", "estimated_seconds"
TARGETS = (
    Target("8B on v5e:4x4, 3 rows a chip: at most 14 GiB, no whole stack gathered", _memory("8b", 14)),
    Target("70B on v5e:16x16, 1 row a chip: at most 12.5 GiB", _memory("70b", 12.5)),
    Target("70B on v5p:4x4x4, 4 rows a chip: fits", _memory("70b-v5p", 0)),
    Target("405B on v5p:8x8x8, 2 rows a chip: fits", _memory("405b", 0)),
    Target("405B: MoR's memory at most 1.01 of LoRA's", _ratio("405b", _PEAK, 1.01)),
    Target("8B: MoR's estimated time at most 1.02 of LoRA's", _ratio("8b", _SECONDS, 1.02)),
    Target("70B on v5e:16x16: the same", _ratio("70b", _SECONDS, 1.02)),
    Target("70B on v5p:4x4x4: the same", _ratio("70b-v5p", _SECONDS, 1.02)),
    Target("405B: the same", _ratio("405b", _SECONDS, 1.02)),
    Target("8B, MoR: estimated time on 64 chips within 10 % of that on 16, at equal work a chip", _weak_scaling),
    Target("8B: adapters, gradients and moments at most 1 % of the base", _share),
)


def table(rows: list[dict]) -> str:
    """The targets as Markdown."""
    known = {(row["case"], row["method"]): row for row in rows}
    lines = ["| target | found | met |", "|---|---|---|"]
    for target in TARGETS:
        try:
            found, met = target.judge(known)
            verdict = "yes" if met else "no"
        except KeyError:
            found, verdict = "not yet run", ""
        lines.append(f"| {target.text} | {found} | {verdict} |")
    return "\n".join(lines)
