"""The table that the benchmark writes: rows of figures as JSON, with the same as Markdown beside it.

A row is {"id", "what", "must", "figure", "command", "machine", ...}. Rows are kept when others are measured again, so
each carries the command, machine and versions that made it. A row without a figure (None) says in its note why.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "peft", "transformers")


@cache
def nvidia_driver() -> str:
    """Version of the driver, "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout else ""


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load, the GPU where that is what computes, and the versions of what is timed."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    on_gpu = jax.default_backend() == "gpu"
    gpu = {"device": jax.local_devices()[0].device_kind, "driver": nvidia_driver()} if on_gpu else {}
    return {
        "backend": jax.default_backend(),
        **gpu,
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, or []."""
    path = output.with_suffix(".json")
    return json.loads(path.read_text())["rows"] if path.exists() else []


def merge_rows(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of ``new``, and of ``old`` what was not measured again, in the order of the ids (C2, C10, remat; G1, G1b).

    A row that is measured again keeps its place among those of its id.
    """
    rows = {(row["id"], row["what"]): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: _id_order(row["id"]))


def _id_order(name: str) -> tuple[float, str]:
    number = re.search(r"\d+", name)
    return (int(number[0]), name[number.end() :]) if number else (math.inf, name)


def is_met(row: dict[str, Any]) -> bool | None:
    """Whether the figure is as "must" says ("<= 1.25", ">= 2.5", "0.98 to 1.02").

    None where it is only reported, or not there.
    """
    if row["figure"] is None:
        return None
    found = re.fullmatch(r"(<=|>=) ([\d.]+)", row["must"])
    if found:
        limit = float(found[2])
        return row["figure"] <= limit if found[1] == "<=" else row["figure"] >= limit
    found = re.fullmatch(r"([\d.]+) to ([\d.]+)", row["must"])
    return float(found[1]) <= row["figure"] <= float(found[2]) if found else None


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The table, then which command and machine made which rows."""
    lines = [
        "# Speed and memory of a training step",
        "",
        "| id | what | figure | quartiles | must | met | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        met = {True: "yes", False: "**no**", None: ""}[is_met(row)]
        cells = (row["id"], row["what"], _figure(row["figure"]), spread, row["must"], met, row.get("note", ""))
        lines.append("| " + " | ".join(cells) + " |")
    for command in dict.fromkeys(row["command"] for row in rows):
        own = [row for row in rows if row["command"] == command]
        ids = ", ".join(dict.fromkeys(row["id"] for row in own))
        lines += ["", f"{ids}: `{command}`"]
        for machine in machine_lines(row["machine"] for row in own if row["machine"]):
            lines += ["", f"on {machine}"]
    return "\n".join(lines) + "\n"


def machine_lines(machines: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each machine and set of versions, with the range of loads that it was under."""
    loads: dict[str, list[float]] = {}
    for machine in machines:
        own = loads.setdefault(json.dumps(machine | {"load": None}), [])
        own += [machine["load"]] if "load" in machine else []
    lines = []
    for machine, own in loads.items():
        told = json.loads(machine) | {"load": _range(own)}
        lines.append(", ".join(f"{name} {value}" for name, value in told.items() if value is not None))
    return lines


def _range(values: list[float]) -> str | None:
    if not values:
        return None
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """``output``.json and ``output``.md, each replaced whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        for suffix, text in ((".json", json.dumps({"rows": rows}, indent=1) + "\n"), (".md", to_markdown(rows))):
            path = Path(scratch) / f"table{suffix}"
            path.write_text(text, encoding="utf-8")
            os.replace(path, output.with_suffix(suffix))
