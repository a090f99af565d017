"""Accuracy, macro F1 and loss of a classifier on labelled rows, one example each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mor_jax.evaluation.tasks import Batch, Batches, by_task, check_rows, grouped
from mor_jax.finite import NotFiniteError
from mor_jax.processes import gathered


def classification(
    logits_fn: Callable[[Batch], Any], batches: Batches, labels: Sequence[str] = (), vocab_size: int | None = None
) -> dict[str, float]:
    """How often the likeliest class is the right one.

    Args:
      logits_fn: Batch -> logits (B, classes).
      batches: With `targets` and `loss_mask`, both (B, S): the class of a row stands where its mask is 1; rows without
        one are padding. Or {task: such batches}.
      labels: Names of the classes, for `accuracy/NAME`, the share of right answers among that class's examples.
      vocab_size: Tokens of the model; None checks none.

    Returns:
      `accuracy`; `macro_f1`, the mean over the classes that occur or are answered; `loss`, the mean negative
      log-probability of the right class in nats; `examples`; of several tasks also `accuracy/TASK` and so on.

    Raises:
      ValueError: When no row has a class, or a task has the name of a class.
      DataError: A token is beyond the vocabulary; names batch and row.
      NotFiniteError: The logits of a row are not finite; names batch and row.
    """
    groups, first, answered = grouped(batches), 0, {}
    both = sorted(set(groups) & set(labels)) if len(groups) > 1 else []
    if both:
        raise ValueError(f"{both[0]!r} is a task and a class, and their figures have one name; name the task otherwise")
    for task, own in groups.items():
        answered[task], rows = _answers(logits_fn, own, vocab_size, f"task {task!r}, " if task else "", first)
        first += rows
        if not len(answered[task][0]):
            among = f" of the task {task!r}" if task else ""
            raise ValueError(f"classification needs a labelled row; the evaluation batches{among} have none")
    truth, answer, losses = (np.concatenate(column) for column in zip(*answered.values(), strict=True))
    metrics = _figures(truth, answer, losses)
    for number in sorted(set(truth.tolist())):
        if number < len(labels):
            metrics[f"accuracy/{labels[number]}"] = float(np.mean(answer[truth == number] == number))
    return metrics | by_task({task: _figures(*own) for task, own in answered.items()})


def _answers(
    logits_fn: Callable[[Batch], Any], batches: Iterable[Batch], vocab_size: int | None, what: str, first: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """((right class, likeliest class, loss) of each labelled row, rows); counted on from `first` in errors."""
    columns: list[tuple[np.ndarray, ...]] = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    seen = 0
    for number, batch in enumerate(batches, 1):
        if vocab_size is not None and "input_ids" in batch:
            check_rows(batch["input_ids"], vocab_size, f"{what}batch {number}")
        mask = np.asarray(batch["loss_mask"])
        rows = np.flatnonzero(mask.max(axis=1) > 0)
        logits = np.asarray(gathered(logits_fn(batch))).astype(np.float64)[rows]
        truth = np.take_along_axis(np.asarray(batch["targets"]), mask.argmax(axis=1)[:, None], axis=1)[rows, 0]
        with np.errstate(invalid="ignore"):  # said below
            shifted = logits - logits.max(axis=1, keepdims=True)
            loss = np.log(np.exp(shifted).sum(axis=1)) - np.take_along_axis(shifted, truth[:, None], axis=1)[:, 0]
        wrong = np.flatnonzero(~np.isfinite(loss))
        if len(wrong):
            place = int(rows[wrong[0]])
            where = f"{what}batch {number}, row {place + 1}"
            raise NotFiniteError(where, f"the loss is {loss[wrong[0]]}", first + seen + place)
        columns.append((truth, logits.argmax(axis=1), loss))
        seen += len(mask)
    truth, answer, losses = (np.concatenate(column) for column in zip(*columns, strict=True))
    return (truth, answer, losses), seen


def _figures(truth: np.ndarray, answer: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    classes = sorted({*truth.tolist(), *answer.tolist()})
    return {
        "accuracy": float(np.mean(truth == answer)),
        "macro_f1": float(np.mean([_f1(truth == number, answer == number) for number in classes])),
        "loss": float(np.mean(losses)),
        "examples": float(len(truth)),
    }


def _f1(truth: np.ndarray, answer: np.ndarray) -> float:
    return float(2 * np.sum(truth & answer) / (np.sum(truth) + np.sum(answer)))
