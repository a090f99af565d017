"""Pictures of a run: its curves, and which experts each task uses. Drawn without a display and without global state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _save(figure: Figure, path: Path) -> Path:
    """Writes beside and renames, so that no half-written picture is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    FigureCanvasAgg(figure).print_figure(beside, dpi=140, bbox_inches="tight")
    os.replace(beside, path)
    return path


def read_metrics(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric in a ``metrics.jsonl``; lines without it are passed over."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    found = [(int(row["step"]), float(row[name])) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def plot_curves(runs: Mapping[str, Path], path: Path, name: str = "loss", smooth: int = 10) -> Path:
    """One metric of several runs over their steps.

    Args:
        runs: Label -> ``metrics.jsonl``.
        path: The picture, by its suffix PNG, SVG or PDF.
        name: The metric.
        smooth: Running mean over so many steps; the raw values stay visible behind it.
    """
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.add_subplot()
    for label, metrics in runs.items():
        steps, values = read_metrics(metrics, name)
        if not steps:
            raise ValueError(f"{metrics} has no metric {name!r}")
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=1)
        window = min(smooth, len(values))
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color=line.get_color(), label=label)
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_routing(
    panels: Mapping[str, Mapping[str, np.ndarray]], tasks: Sequence[str], path: Path, title: str = ""
) -> Path:
    """Mean gates as heat maps, a row a panel and a column a site: tasks down, experts across.

    Args:
        panels: Row label (``learned``, ``shuffled labels``) -> site -> (tasks, experts) mean gates, rows summing to 1.
        tasks: Names of the tasks.
        path: The picture.
        title: Above all.
    """
    sites = list(next(iter(panels.values())))
    figure = Figure(figsize=(2.4 * len(sites) + 1.6, (0.32 * len(tasks) + 1.1) * len(panels) + 0.5))
    grid = figure.subplots(len(panels), len(sites), squeeze=False)
    largest = max(float(np.max(gates)) for row in panels.values() for gates in row.values())
    image = None
    for row, (label, by_site) in enumerate(panels.items()):
        for column, site in enumerate(sites):
            axes, gates = grid[row][column], np.asarray(by_site[site])
            image = axes.imshow(gates, vmin=0.0, vmax=largest, aspect="auto", cmap="viridis")
            axes.set_xticks(range(gates.shape[1]), [str(i) for i in range(gates.shape[1])], fontsize=7)
            axes.set_yticks(range(len(tasks)), list(tasks) if column == 0 else [""] * len(tasks), fontsize=8)
            if row == 0:
                axes.set_title(site, fontsize=8)
            if column == 0:
                axes.set_ylabel(label, fontsize=9)
            if row == len(panels) - 1:
                axes.set_xlabel("expert", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid.ravel().tolist(), label="mean gate", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=10, y=1.02)
    return _save(figure, path)
