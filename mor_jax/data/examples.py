"""All examples of a mixture in a few flat arrays: tokens, what is learned, task and source, and what was left out.

Everything is read and tokenised before training starts, so a bad line stops the run before its first step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mor_jax.data.records import Encoded, encode_record
from mor_jax.data.sources import DataError, DataSource, read_records

Overlong = Literal["truncate", "drop", "error"]
OVERLONG = ("truncate", "drop", "error")


@dataclass(frozen=True)
class SourceCounts:
    """What became of a source's records: `read` = `kept` + `dropped` + `empty`; `truncated` are among the kept.

    Attributes:
      read: Records in the source.
      kept: Examples that training sees.
      truncated: Over-long examples that lost their end.
      dropped: Over-long examples left out, by choice or since nothing to learn was left within the length.
      empty: Examples without a token to learn.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised examples of a mixture, flat: example i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
      tokens: (T,) int32.
      learned: (T,) bool, true where the token is to be predicted.
      offsets: (N + 1,) int64.
      prompt_lengths: (N,) int32, tokens before the first answer (0 for plain text).
      source_ids: (N,) int32, index into `sources`.
      task_ids: (N,) int32, index into `tasks`.
      sources: The files and datasets of the mixture.
      tasks: Names of the tasks, in the order of their ids.
      counts: What was read, truncated and left out, for each source.
      labels: (N,) int32, the class of each example where a class is to be learned, else None.
      second_starts: (N,) int32, tokens before the second text of a pair (all of them without one); None without labels.
    """

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    source_ids: np.ndarray
    task_ids: np.ndarray
    sources: tuple[DataSource, ...]
    tasks: tuple[str, ...]
    counts: tuple[SourceCounts, ...]
    labels: np.ndarray | None = None
    second_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64: tokens of each example."""
        return np.diff(self.offsets)

    @property
    def num_tasks(self) -> int:
        """How many tasks have an id."""
        return len(self.tasks)

    @property
    def truncated(self) -> int:
        """Over-long examples that lost their end, of all sources."""
        return sum(count.truncated for count in self.counts)

    @property
    def dropped(self) -> int:
        """Over-long examples that were left out, of all sources."""
        return sum(count.dropped for count in self.counts)

    @property
    def empty(self) -> int:
        """Examples left out since they had no token to learn, of all sources."""
        return sum(count.empty for count in self.counts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a batch can show: tokens, masks, prompts, sources, tasks."""
        digest = hashlib.sha256("\0".join(self.tasks).encode())
        arrays = (self.tokens, self.learned, self.offsets, self.prompt_lengths, self.source_ids, self.task_ids)
        for array in (*arrays, *(own for own in (self.labels, self.second_starts) if own is not None)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_examples(
    sources: Sequence[DataSource],
    tokenizer: Any,
    max_length: int,
    overlong: Overlong = "truncate",
    *,
    tasks: Sequence[str] | None = None,
) -> Examples:
    """Reads, tokenises and checks every record of the sources.

    Args:
      sources: What to read, in this order.
      tokenizer: A fast Hugging Face tokenizer.
      max_length: The most tokens an example may have.
      overlong: What happens to longer ones: `truncate` keeps the first `max_length` tokens, `drop` leaves them out
        (both are counted), `error` stops.
      tasks: Names in the order of their ids, for data that must agree with others (evaluation with training); None
        numbers them as they first occur.

    Raises:
      DataError: At the first record that cannot be used, named by file and line; for a task that `tasks` does not have;
        and when a source has no example left.
      ValueError: If `max_length` is under 2 or `overlong` is none of the three.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and the one it predicts), got {max_length}")
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    if not sources:
        raise DataError("no data was named; give at least one [TASK=]PATH[:WEIGHT]")
    names = tuple(tasks) if tasks is not None else tuple(dict.fromkeys(source.task for source in sources))
    kept: list[Encoded] = []
    source_ids: list[int] = []
    counts = []
    for index, source in enumerate(sources):
        if source.task not in names:
            raise DataError(
                f"{source.path}: the task {source.task!r} is not one of {', '.join(names)}; write TASK=PATH"
            )
        examples, count = _load_source(source, tokenizer, max_length, overlong)
        kept += examples
        source_ids += [index] * len(examples)
        counts.append(count)
    return _flatten(kept, source_ids, tuple(sources), names, tuple(counts))


def _load_source(
    source: DataSource, tokenizer: Any, max_length: int, overlong: str
) -> tuple[list[Encoded], SourceCounts]:
    kept: list[Encoded] = []
    read = truncated = dropped = empty = 0
    for where, record in read_records(source):
        read += 1
        example = encode_record(record, tokenizer, where)
        if not example.learned[1:].any():  # nothing predicts the first token
            empty += 1
            continue
        length = len(example.tokens)
        if length <= max_length:
            kept.append(example)
            continue
        if overlong == "error":
            raise DataError(
                f"{where}: {length} tokens, more than {max_length}; shorten it, or truncate or drop such examples"
            )
        cut = Encoded(example.tokens[:max_length], example.learned[:max_length], min(example.prompt_length, max_length))
        if overlong == "drop" or not cut.learned[1:].any():
            dropped += 1
        else:
            truncated += 1
            kept.append(cut)
    if not kept:
        raise DataError(
            f"{source.path}: none of its {read} examples can be used: {dropped} are over {max_length} tokens,"
            f" {empty} have nothing to learn; raise the sequence length or mend the file"
        )
    return kept, SourceCounts(read, len(kept), truncated, dropped, empty)


def _flatten(kept: list[Encoded], source_ids: list[int], sources, tasks, counts) -> Examples:
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(example.tokens) for example in kept], out=offsets[1:])
    source_array = np.array(source_ids, np.int32)
    task_of_source = np.array([tasks.index(source.task) for source in sources], np.int32)
    return Examples(
        tokens=np.concatenate([example.tokens for example in kept]).astype(np.int32),
        learned=np.concatenate([example.learned for example in kept]),
        offsets=offsets,
        prompt_lengths=np.array([example.prompt_length for example in kept], np.int32),
        source_ids=source_array,
        task_ids=task_of_source[source_array],
        sources=sources,
        tasks=tasks,
        counts=counts,
    )
