"""Accuracy, macro F1 and loss of a classifier on labelled rows, one example each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.processes import gathered

Batch = Mapping[str, Any]


def classification(
    logits_fn: Callable[[Batch], Any], batches: Iterable[Batch], labels: Sequence[str] = ()
) -> dict[str, float]:
    """How often the likeliest class is the right one.

    Args:
      logits_fn: Batch -> logits (B, classes).
      batches: With `targets` and `loss_mask`, both (B, S): the class of a row stands where its mask is 1; rows without
        one are padding.
      labels: Names of the classes, for `accuracy/NAME`, the share of right answers among that class's examples.

    Returns:
      `accuracy`; `macro_f1`, the mean over the classes that occur or are answered; `loss`, the mean negative
      log-probability of the right class in nats; `examples`.

    Raises:
      ValueError: When no row has a class.
    """
    right, found, losses = [], [], []
    for batch in batches:
        mask = np.asarray(batch["loss_mask"])
        rows = mask.max(axis=1) > 0
        logits = np.asarray(gathered(logits_fn(batch))).astype(np.float64)[rows]
        truth = np.take_along_axis(np.asarray(batch["targets"]), mask.argmax(axis=1)[:, None], axis=1)[rows, 0]
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(axis=1)) - np.take_along_axis(shifted, truth[:, None], axis=1)[:, 0])
        right.append(truth)
        found.append(logits.argmax(axis=1))
    if not sum(map(len, right)):
        raise ValueError("classification needs at least one labelled row; the evaluation batches have none")
    truth, answer = np.concatenate(right), np.concatenate(found)
    classes = sorted({*truth.tolist(), *answer.tolist()})
    metrics = {
        "accuracy": float(np.mean(truth == answer)),
        "macro_f1": float(np.mean([_f1(truth == number, answer == number) for number in classes])),
        "loss": float(np.mean(np.concatenate(losses))),
        "examples": float(len(truth)),
    }
    for number in sorted(set(truth.tolist())):
        if number < len(labels):
            metrics[f"accuracy/{labels[number]}"] = float(np.mean(answer[truth == number] == number))
    return metrics


def _f1(truth: np.ndarray, answer: np.ndarray) -> float:
    return float(2 * np.sum(truth & answer) / (np.sum(truth) + np.sum(answer)))
