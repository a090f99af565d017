"""Batches from a packing plan: an endless grain iterator for training, and one pass in order for evaluation.

Its state is the global number of the next row and the plan's hash. Nothing else decides what comes next, so a run may
resume with another batch size or number of hosts and see the rows that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from mor_jax.data.examples import Examples
from mor_jax.data.packing import EpochRows, PackingPlan, permutation
from mor_jax.data.sources import DataError

Batch = dict[str, np.ndarray]
BATCH_FIELDS = ("input_ids", "targets", "loss_mask", "segment_ids", "positions", "task_ids", "prompt_mask")


def build_row(examples: Examples, members: np.ndarray, row_length: int) -> Batch:
    """One row of the members' tokens, one segment each, (row_length,) int32 each; the rest is padding (zeros).

    `input_ids`; `targets`, the next token of the same segment (0 after its last); `loss_mask`, 1 where that target is
    to be learned; `segment_ids` from 1; `positions` from 0 in each segment; `task_ids`; `prompt_mask`, 1 on the prompt.
    Of labelled examples the target of each first token is its example's class and no other is learned; beside it come
    `token_type_ids`, 1 on the second text of a pair.
    """
    fields = BATCH_FIELDS if examples.labels is None else (*BATCH_FIELDS, "token_type_ids")
    row = {field: np.zeros(row_length, np.int32) for field in fields}
    start = 0
    for segment, member in enumerate(members, 1):
        first, last = examples.offsets[member], examples.offsets[member + 1]
        end = start + int(last - first)
        row["input_ids"][start:end] = examples.tokens[first:last]
        if examples.labels is None or examples.second_starts is None:
            row["targets"][start : end - 1] = examples.tokens[first + 1 : last]
            row["loss_mask"][start : end - 1] = examples.learned[first + 1 : last]
        else:
            row["targets"][start], row["loss_mask"][start] = examples.labels[member], 1
            row["token_type_ids"][start + examples.second_starts[member] : end] = 1
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        row["task_ids"][start:end] = examples.task_ids[member]
        row["prompt_mask"][start : start + examples.prompt_lengths[member]] = 1
        start = end
    return row


def stack_rows(rows: list[Batch]) -> Batch:
    """The rows as one batch of (B, S) int32 arrays."""
    return {field: np.stack([row[field] for row in rows]) for field in rows[0]}


class BatchIterator(grain.DatasetIterator):
    """Endless batches over reshuffled epochs; a batch may span two. Can also be saved by grain's Orbax handler."""

    def __init__(
        self,
        examples: Examples,
        plan: PackingPlan,
        batch_size: int,
        seed: int = 0,
        held: Sequence[int] | np.ndarray | None = None,
    ):
        super().__init__()
        self._examples, self._plan, self._batch_size, self._seed = examples, plan, batch_size, seed
        self._held = range(batch_size) if held is None else [int(position) for position in held]
        self._next_row = 0
        self._starts = [0]  # global number of the first row of each epoch walked so far, for unequal epochs
        self._cached: tuple[int, EpochRows, np.ndarray] | None = None

    def __next__(self) -> Batch:
        """The next batch; of several processes, the rows of it that this one holds."""
        self._assert_not_closed()
        batch = stack_rows([self._row(self._next_row + position) for position in self._held])
        self._next_row += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """What decides the next batch, for JSON: the global row number, the row order's seed and the plan's hash."""
        return {"row": self._next_row, "seed": self._seed, "plan": self._plan.hash}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was taken.

        Raises:
          DataError: If the state belongs to other data, another packing or another seed.
        """
        if state["plan"] != self._plan.hash or state["seed"] != self._seed:
            raise DataError(
                "the saved place in the data belongs to another packing plan (files, weights, tokenizer, sequence"
                " length or seed changed); resume with those of the run, or start a new run"
            )
        self._next_row = int(state["row"])

    def _row(self, number: int) -> Batch:
        epoch, position = self._locate(number)
        rows, order = self._epoch_rows(epoch)
        return build_row(self._examples, rows.row(order[position]), self._plan.row_length)

    def _epoch_rows(self, epoch: int) -> tuple[EpochRows, np.ndarray]:
        """The epoch's rows, and in which order they come; the last epoch asked for is kept."""
        if self._cached is None or self._cached[0] != epoch:
            rows = self._plan.epoch_rows(epoch)
            self._cached = (epoch, rows, permutation(rows.num_rows, self._seed, 4, epoch))
        return self._cached[1:]

    def _locate(self, number: int) -> tuple[int, int]:
        """(epoch, row within it) of a global row number."""
        if self._plan.has_equal_epochs:
            known = self._cached[0] if self._cached else 0
            return divmod(number, self._epoch_rows(known)[0].num_rows)
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self._epoch_rows(len(self._starts) - 1)[0].num_rows)
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, number - self._starts[epoch]


def make_iterator(
    examples: Examples,
    plan: PackingPlan,
    batch_size: int,
    seed: int = 0,
    held: Sequence[int] | np.ndarray | None = None,
) -> BatchIterator:
    """An endless iterator over batches of `batch_size` rows, counted over all processes.

    Args:
      examples: What the plan was made for.
      plan: Rows of each epoch.
      batch_size: Rows of a global batch.
      seed: Decides the order of the rows in each epoch.
      held: Positions in each batch, from 0, of the rows that this process builds; None builds all.

    Raises:
      ValueError: If the plan is for other examples or a position lies outside the batch.
    """
    _check(examples, plan, batch_size)
    if held is not None and not all(0 <= position < batch_size for position in held):
        raise ValueError(f"held must lie in 0..{batch_size - 1}, the positions in a batch, got {list(held)}")
    return BatchIterator(examples, plan, batch_size, seed, held)


def single_pass(examples: Examples, plan: PackingPlan, batch_size: int) -> Iterator[Batch]:
    """Each row of the first epoch once, for evaluation; the last batch is filled with empty rows (segment 0, no loss).

    Raises:
      ValueError: If the plan is for other examples or `batch_size` is under 1.
    """
    _check(examples, plan, batch_size)
    return _single_pass(examples, plan, batch_size)


def _single_pass(examples: Examples, plan: PackingPlan, batch_size: int) -> Iterator[Batch]:
    rows = plan.epoch_rows(0)
    nothing = np.zeros(0, np.int64)
    for first in range(0, rows.num_rows, batch_size):
        members = [rows.row(n) if n < rows.num_rows else nothing for n in range(first, first + batch_size)]
        yield stack_rows([build_row(examples, each, plan.row_length) for each in members])


def _check(examples: Examples, plan: PackingPlan, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if plan.fingerprint != examples.fingerprint:
        raise ValueError("the packing plan was made for other examples; make it with make_plan(examples, ...)")
