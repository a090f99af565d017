"""Figures by task: `NAME/TASK` beside those of all records, and their unweighted mean over the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mor_jax.data import check_tokens

COUNTS = ("tokens", "examples", "questions", "truncated")

Batch = Mapping[str, Any]
Batches = Iterable[Batch] | Mapping[str, Iterable[Batch]]


def grouped(batches: Batches) -> dict[str, Iterable[Batch]]:
    """{task: batches}; batches of no named task are of the task ""."""
    if isinstance(batches, Mapping):
        return {str(task): own for task, own in batches.items()}
    return {"": batches}


def by_task(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`NAME/TASK` for the figures of every task when there is more than one, else nothing."""
    if len(figures) < 2:
        return {}
    return {f"{name}/{task}": value for task, own in sorted(figures.items()) for name, value in own.items()}


def task_means(metrics: Mapping[str, float], tasks: Iterable[str]) -> dict[str, float]:
    """`mean_NAME`, each task counting alike, for every figure of which there is one by task; counts have no mean.

    >>> task_means({"accuracy": 0.4, "accuracy/a": 1.0, "accuracy/b": 0.0}, ("a", "b"))
    {'mean_accuracy': 0.5}
    """
    names = tuple(tasks)
    figures = [name for name in metrics if name not in COUNTS and all(f"{name}/{task}" in metrics for task in names)]
    if len(names) < 2:
        return {}
    return {f"mean_{name}": float(np.mean([metrics[f"{name}/{task}"] for task in names])) for name in figures}


def check_rows(rows: Any, vocab_size: int, where: str) -> None:
    """Returns when a model of that vocabulary has all tokens of the rows (B, S).

    Raises:
      DataError: Names the row, from 1, and the token.
    """
    values = np.asarray(rows)
    wrong = np.flatnonzero(((values >= vocab_size) | (values < 0)).any(axis=-1))
    if len(wrong):
        check_tokens(values[wrong[0]], vocab_size, f"{where}, row {wrong[0] + 1}")
