"""Which examples share a row, for every epoch: a pure function of token lengths, weights and a seed.

An epoch's rows come from packing its examples, longest first, into rows of `row_length` tokens: each goes where it
leaves the least space (`best_fit`), or alone into its own (`padded`). The seed decides among examples of equal length
and the order of the rows, so each epoch has other neighbours but, with whole weights, equally many rows. No host,
worker or batch size enters: rows are dealt by their global number, counted over all epochs.

A source of weight w shows each of its examples floor(w) times an epoch, and a share of w - floor(w) of them once more;
the shares of successive epochs take turns, so that all are seen equally often.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from mor_jax.data.examples import Examples

Mode = Literal["best_fit", "padded"]
MODES = ("best_fit", "padded")
_VERSION = 1  # raised whenever the same inputs would give other rows


class EpochRows(NamedTuple):
    """Rows of one epoch: row r holds `examples[offsets[r]:offsets[r + 1]]`, in this order. Both int64."""

    examples: np.ndarray
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        """How many rows the epoch has."""
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        """Ids of the examples in the row."""
        return self.examples[self.offsets[number] : self.offsets[number + 1]]


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of all epochs, described by what they follow from.

    Attributes:
      lengths: (N,) int64, tokens of each example.
      source_ids: (N,) int64, index of each example's source.
      weights: How often an example of each source occurs per epoch.
      row_length: Tokens in a row.
      seed: Decides ties, the order of rows and the turns of fractional weights.
      mode: `best_fit` or `padded` (one example per row).
      fingerprint: SHA-256 of the examples' contents; part of the plan's hash.

    Raises:
      ValueError: If an example is longer than a row or has no token, a weight is not positive, or the mode is unknown.
    """

    lengths: np.ndarray
    source_ids: np.ndarray
    weights: tuple[float, ...]
    row_length: int
    seed: int = 0
    mode: Mode = "best_fit"
    fingerprint: str = ""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"PackingPlan.mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not len(self.lengths):
            raise ValueError("PackingPlan.lengths is empty; a plan needs at least one example")
        if self.lengths.min() < 1 or self.lengths.max() > self.row_length:
            raise ValueError(
                f"PackingPlan.lengths must lie in 1..{self.row_length} (the row length), got"
                f" {self.lengths.min()}..{self.lengths.max()}; truncate or drop when loading"
            )
        if not all(weight > 0 for weight in self.weights):
            raise ValueError(f"PackingPlan.weights must be positive, got {self.weights}")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything the rows follow from, and of the examples' contents."""
        fields = [_VERSION, self.weights, self.row_length, self.seed, self.mode, self.fingerprint]
        digest = hashlib.sha256(json.dumps(fields).encode())
        digest.update(np.asarray(self.lengths, "<i8").tobytes())
        digest.update(np.asarray(self.source_ids, "<i8").tobytes())
        return digest.hexdigest()

    @property
    def has_equal_epochs(self) -> bool:
        """Whether all epochs have equally many rows (all weights are whole numbers)."""
        return all(float(weight).is_integer() for weight in self.weights)

    def epoch_examples(self, epoch: int) -> np.ndarray:
        """Ids of the examples that occur in the epoch, repeated where the weight says so. int64."""
        parts = []
        for source, weight in enumerate(self.weights):
            ids = np.flatnonzero(self.source_ids == source)
            whole = int(weight)
            share = (weight - whole) * len(ids)
            turns = np.arange(int(epoch * share), int((epoch + 1) * share))
            order = permutation(len(ids), self.seed, 1, source)
            parts += [ids] * whole + [np.sort(ids[order[turns % max(len(ids), 1)]])]
        return np.concatenate(parts)

    def epoch_rows(self, epoch: int) -> EpochRows:
        """The epoch's rows in the order in which they are dealt. The same on every machine."""
        ids = self.epoch_examples(epoch)
        ids = ids[permutation(len(ids), self.seed, 2, epoch)]
        if self.mode == "padded":
            return EpochRows(ids, np.arange(len(ids) + 1))
        ids = ids[np.argsort(-self.lengths[ids], kind="stable")]
        rows = pack(self.lengths[ids], self.row_length)
        order = permutation(len(rows), self.seed, 3, epoch)
        members = [rows[number] for number in order]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in members], out=offsets[1:])
        flat = [item for row in members for item in row]
        return EpochRows(ids[np.array(flat, np.int64)], offsets)

    def efficiency(self, epoch: int = 0) -> float:
        """The share of the epoch's positions that hold a token."""
        rows = self.epoch_rows(epoch)
        return float(self.lengths[rows.examples].sum() / max(rows.num_rows * self.row_length, 1))


def make_plan(examples: Examples, row_length: int, seed: int = 0, mode: Mode = "best_fit") -> PackingPlan:
    """The plan for `examples` with the weights of their sources.

    Raises:
      ValueError: As `PackingPlan`.
    """
    return PackingPlan(
        lengths=examples.lengths,
        source_ids=examples.source_ids.astype(np.int64),
        weights=tuple(float(source.weight) for source in examples.sources),
        row_length=row_length,
        seed=seed,
        mode=mode,
        fingerprint=examples.fingerprint,
    )


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of indices into `lengths`, filled in the order given (decreasing lengths pack well); none over `row_length`.

    Each goes where the least space is left after it. O(n log n) or better.

    >>> pack([5, 4, 3, 2, 2], 8)
    [[0, 2], [1, 3, 4]]
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens -> rows
    spaces: list[int] = []  # sorted keys of by_space; at most row_length of them
    for index, length in enumerate(int(n) for n in lengths):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, left = len(rows), row_length - length
            rows.append([index])
        else:
            space = spaces[at]
            row, left = by_space[space].pop(), space - length
            rows[row].append(index)
            if not by_space[space]:
                del by_space[space], spaces[at]
        if left and left not in by_space:
            bisect.insort(spaces, left)
            by_space[left] = []
        if left:
            by_space[left].append(row)
    return rows


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A permutation of 0..size-1 that depends on the seeds alone. (size,) int64.

    NumPy's generators may change their streams between releases, so the order comes from hashed numbers (splitmix64's
    finaliser).
    """
    state = np.uint64(int.from_bytes(hashlib.sha256(json.dumps(seeds).encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        keys = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")
