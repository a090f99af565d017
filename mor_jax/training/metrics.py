"""What a run reports: a JSON line a step, TensorBoard events, a progress bar, and the table before step one.

Everything people read goes to stderr; stdout belongs to the caller.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from mor_jax.merging import APPROXIMATIONS


class MetricsWriter:
    """Appends `metrics.jsonl` and TensorBoard events in a run folder.

    On resume the lines after `step` are cut off, so that a file has each step once.
    """

    def __init__(self, directory: str | Path, step: int = 0):
        import tensorboardX

        self.path = Path(directory) / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step_of(line) <= step] if step else []
        beside = self.path.with_suffix(".jsonl.tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self.path)
        self._stream = open(self.path, "a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line: `step` and the values, arrays as lists; TensorBoard gets the numbers and flat mappings."""
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        for name, value in values.items():
            for tag, number in _scalars(name, value):
                self._events.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._stream.close()
        self._events.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


_NUMBER = int | float | np.number


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [(f"{name}/{key}", float(item)) for key, item in value.items() if isinstance(item, _NUMBER)]
    array = np.asarray(value)
    return [(name, float(array))] if array.ndim == 0 and np.issubdtype(array.dtype, np.number) else []


def _plain(value: Any) -> Any:
    """`value` in JSON's types; JSON has no NaN, so non-finite numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int | type(None)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _plain(np.asarray(value).tolist())


def router_metrics(statistics: Mapping[str, Mapping[str, Any]], tasks: Sequence[str] = ()) -> dict[str, Any]:
    """What a step's routers did, from the sums that the step returns.

    Args:
      statistics: {site or block: {"load" (layers..., N), "entropy" and "count" (layers..., 1), "task_load"
        (layers..., T, N), "task_count" (layers..., T), "balance" (layers..., 1)}}, sums over real tokens.
      tasks: names in the order of their ids.

    Returns:
      `router_entropy` (nats), `router_max_load` (share of the most used expert) and, for balanced routers,
      `router_balance`: means over all routers; `router`: {site: {"load" (N,), "entropy", "task_gates" {task: (N,)}}},
      means over tokens and layers; a task without tokens in the step is left out. Empty for methods without a router.
    """
    routers = {path: {k: np.asarray(v, np.float64) for k, v in sums.items()} for path, sums in statistics.items()}
    routers = {path: sums for path, sums in routers.items() if "load" in sums}
    if not routers:
        return {}
    described, entropies, loads = {}, [], []
    for path, sums in routers.items():
        count = np.maximum(sums["count"], 1.0)
        load, entropy = sums["load"] / count, sums["entropy"] / count
        described[path] = {"load": _over_layers(load), "entropy": float(entropy.mean())}
        if len(tasks) > 1 and "task_load" in sums:
            described[path]["task_gates"] = _task_gates(sums, tasks)
        entropies.append(entropy.ravel())
        loads.append(load.max(-1).ravel())
    result: dict[str, Any] = {"router_entropy": float(np.concatenate(entropies).mean())}
    result["router_max_load"] = float(np.concatenate(loads).mean())
    balances = [sums["balance"].ravel() for sums in routers.values() if "balance" in sums]
    if balances:
        result["router_balance"] = float(np.concatenate(balances).mean())
    return result | {"router": described}


def _over_layers(values: np.ndarray) -> list[float]:
    return values.reshape(-1, values.shape[-1]).mean(0).tolist()


def _task_gates(sums: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, list[float]]:
    gates = sums["task_load"] / np.maximum(sums["task_count"], 1.0)[..., None]
    seen = sums["task_count"].reshape(-1, len(tasks))[0] > 0
    return {name: _over_layers(gates[..., number, :]) for number, name in enumerate(tasks) if seen[number]}


class Progress:
    """A progress bar with loss, tokens/s, time left and memory on `stream` (stderr by default)."""

    def __init__(self, steps: int, start: int = 0, every: int = 1, stream: TextIO | None = None):
        import tqdm

        self._every = every
        self._bar = tqdm.tqdm(
            total=steps, initial=start, file=stream or sys.stderr, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar to `step`."""
        if step % self._every == 0:
            memory = f"{max(bytes or 0 for bytes in peak_memory().values()) / 2**30:.2f} GiB"
            self._bar.set_postfix(loss=f"{loss:.4f}", tokens=f"{tokens_per_second:.0f}/s", memory=memory, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


class Output:
    """What process 0 keeps and shows of each step: its line, its events, the bar."""

    def __init__(self, directory: str | Path, steps: int, start: int = 0, every: int = 1):
        self._writer = MetricsWriter(directory, start)
        self._progress = Progress(steps, start, every)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values of a step, and moves the bar by its `loss` and `tokens_per_second`."""
        self._writer.write(step, values)
        self._progress.update(step, float(values["loss"]), float(values["tokens_per_second"]))

    def close(self) -> None:
        """Ends the bar's line and closes the files."""
        self._progress.close()
        self._writer.close()


def peak_memory() -> dict[str, int | None]:
    """`peak_rss_bytes` of this process, and `peak_device_bytes` of its fullest device, None where none tells."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    told = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_rss_bytes": rss, "peak_device_bytes": max(told, default=None)}


class Throughput:
    """Real tokens a second since the end of step `skip`, so that compilation does not count."""

    def __init__(self, skip: int = 2):
        self._skip, self._seen, self._tokens, self._start = skip, 0, 0.0, 0.0

    def add(self, tokens: float) -> float:
        """Counts one finished step and returns `rate()`."""
        self._seen += 1
        if self._seen <= self._skip:
            self._start = time.perf_counter()
        else:
            self._tokens += tokens
        return self.rate()

    def leave_out(self, seconds: float) -> None:
        """Takes time out that was no training."""
        self._start += seconds

    def rate(self) -> float:
        """Tokens a second; 0 before step `skip + 1` has ended."""
        elapsed = time.perf_counter() - self._start
        return self._tokens / elapsed if self._tokens and elapsed > 0 else 0.0

    def step_seconds(self) -> float:
        """Mean seconds a step; 0 before step `skip + 1` has ended."""
        counted = self._seen - self._skip
        return (time.perf_counter() - self._start) / counted if counted > 0 else 0.0


@dataclass(frozen=True)
class TargetRow:
    """One line of the table of targets."""

    path: str
    shape: str  # of the frozen kernel of one layer, times layers
    rank: str
    trainable: int
    frozen: int
    optimizer_bytes: int
    merges: str = ""  # "exact", "approximate", what has to be set first, or empty where nothing is merged


def print_targets(rows: Sequence[TargetRow], title: str, stream: TextIO | None = None) -> None:
    """Prints the table of targets with its sums on `stream` (stderr by default)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("site", "shape", "rank", "trainable", "frozen", "optimiser bytes", "merges"):
        justify = "left" if name in ("site", "shape", "merges") else "right"
        table.add_column(name, justify=justify, no_wrap=name == "site")
    for row in rows:
        table.add_row(
            row.path,
            row.shape,
            row.rank,
            *(f"{n:,}" for n in (row.trainable, row.frozen, row.optimizer_bytes)),
            row.merges,
        )
    sums = [sum(getattr(row, name) for row in rows) for name in ("trainable", "frozen", "optimizer_bytes")]
    table.add_section()
    table.add_row("total", "", "", *(f"{total:,}" for total in sums))
    how = next((row.merges for row in rows if row.merges not in ("", "exact")), "exact")
    table.caption = "merge into the base: " + (f"{how} ({APPROXIMATIONS})" if how == "approximate" else how)
    Console(file=stream or sys.stderr, width=None if sys.stderr.isatty() else 120).print(table)
