"""What the comparisons share: figures over seeds, verdicts, and the table with its command, machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


def percent(value: float) -> str:
    """One decimal."""
    return f"{100 * value:.1f}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± standard deviation` in percent; the figure alone where there is one."""
    if len(values) < 2:
        return percent(values[0])
    return f"{percent(statistics.mean(values))} ± {percent(statistics.stdev(values))}"


def verdict(differences: Sequence[float]) -> str:
    """`win`, `loss` or `tie`: a tie unless the mean is over twice its standard error; paired, a value a seed."""
    if len(differences) < 2:
        return "one seed"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) <= 2 * error or mean == 0:
        return "tie"
    return "win" if mean > 0 else "loss"


def write(output: Path, title: str, command: str, settings: Any, body: list[str], data: dict[str, Any]) -> None:
    """`output`.md and `output`.json with command, settings, machine and versions; each file is replaced whole."""
    facts = {
        "command": command,
        "settings": settings,
        "machine": {"backend": jax.default_backend(), "cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    notes = [f"{name}: {facts[name]}\n" for name in ("settings", "machine", "versions")]
    text = [f"# {title}", "", f"`{command}`", "", *body, "", *notes]
    for suffix, content in ((".md", "\n".join(text)), (".json", json.dumps(facts | data, indent=1) + "\n")):
        beside = output.with_name(f".{output.name}.partial{suffix}")
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, output.with_suffix(suffix))
