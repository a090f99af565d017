"""What a run reports: a JSON line a step, TensorBoard events, a progress bar, and the table before step one.

Everything people read goes to stderr; stdout belongs to the caller.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np


class MetricsWriter:
    """Appends `metrics.jsonl` and TensorBoard events in a run folder.

    On resume the lines after `step` are cut off, so that a file has each step once.
    """

    def __init__(self, directory: str | Path, step: int = 0, tensorboard: bool = True):
        self.path = Path(directory) / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step_of(line) <= step] if step else []
        self.path.write_text("".join(kept), encoding="utf-8")
        self._stream = open(self.path, "a", encoding="utf-8")
        self._events = None
        if tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line: `step` and the values; arrays become lists, in TensorBoard one scalar an element."""
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        if self._events is None:
            return
        for name, value in values.items():
            array = np.asarray(value)
            if not np.issubdtype(array.dtype, np.number):
                continue
            for index in np.ndindex(*array.shape):
                tag = "/".join([name, *(str(part) for part in index)])
                self._events.add_scalar(tag, float(array[index]), step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._stream.close()
        if self._events is not None:
            self._events.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | type(None)):
        return value
    array = np.asarray(value)
    return _finite(array.tolist()) if np.issubdtype(array.dtype, np.floating) else array.tolist()


def _finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


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
            memory = f"{memory_bytes() / 2**30:.2f} GiB"
            self._bar.set_postfix(loss=f"{loss:.4f}", tokens=f"{tokens_per_second:.0f}/s", memory=memory, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


def memory_bytes() -> int:
    """Peak bytes in use: of the fullest local device where it tells, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device_peak = max((entry.get("peak_bytes_in_use", 0) for entry in stats), default=0)
    unit = 1 if sys.platform == "darwin" else 1024
    return device_peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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

    def rate(self) -> float:
        """Tokens a second; 0 before step `skip + 1` has ended."""
        elapsed = time.perf_counter() - self._start
        return self._tokens / elapsed if self._tokens and elapsed > 0 else 0.0


@dataclass(frozen=True)
class TargetRow:
    """One line of the table of targets."""

    path: str
    shape: str  # of the frozen kernel of one layer, times layers
    rank: str
    trainable: int
    frozen: int
    optimizer_bytes: int


def print_targets(rows: Sequence[TargetRow], title: str, stream: TextIO | None = None) -> None:
    """Prints the table of targets with its sums on `stream` (stderr by default)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("site", "shape", "rank", "trainable", "frozen", "optimiser bytes"):
        table.add_column(name, justify="left" if name in ("site", "shape") else "right", no_wrap=name == "site")
    for row in rows:
        table.add_row(
            row.path, row.shape, row.rank, *(f"{n:,}" for n in (row.trainable, row.frozen, row.optimizer_bytes))
        )
    sums = [sum(getattr(row, name) for row in rows) for name in ("trainable", "frozen", "optimizer_bytes")]
    table.add_section()
    table.add_row("total", "", "", *(f"{total:,}" for total in sums))
    Console(file=stream or sys.stderr, width=None if sys.stderr.isatty() else 120).print(table)
