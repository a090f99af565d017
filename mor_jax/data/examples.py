"""All examples of a mixture in a few flat arrays: tokens, what is learned, task and source, and what was left out.

Everything is read and tokenised before training starts, so a bad line stops the run before its first step. Tokens and
masks go to files as they are made and are mapped into memory from there, so a mixture may be larger than memory: what
stays in memory is a few numbers an example. The files have no name, so that whoever ends the process removes them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import mmap
import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, Literal

import numpy as np

from mor_jax.data.chat import Encoded
from mor_jax.data.records import encode_record
from mor_jax.data.sources import DataError, DataSource, read_records
from mor_jax.data.tokenization import Tokenization, as_tokenization
from mor_jax.data.vocabulary import check_tokens

_LOGGER = logging.getLogger(__name__)
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
      shortened: Conversations of which the chat template does not show all that the assistant says.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    shortened: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """N tokenised examples of a mixture, flat: example i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
      tokens: (T,) int32, read-only, mapped from a file.
      learned: (T,) bool, true where the token is to be predicted; likewise.
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
        for values in (*arrays, *(own for own in (self.labels, self.second_starts) if own is not None)):
            digest.update(np.ascontiguousarray(values).data)  # read in place: `tobytes` would bring a copy into memory
        return digest.hexdigest()


def load_examples(
    sources: Sequence[DataSource],
    tokenizer: Any,
    max_length: int,
    overlong: Overlong = "truncate",
    *,
    vocab_size: int | None = None,
    tasks: Sequence[str] | None = None,
    scratch: str | os.PathLike | None = None,
) -> Examples:
    """Reads, tokenises and checks every record of the sources.

    Args:
      sources: What to read, in this order.
      tokenizer: A `Tokenization`, or a fast Hugging Face tokenizer.
      max_length: The most tokens an example may have.
      overlong: What happens to longer ones: `truncate` keeps the first `max_length` tokens, `drop` leaves them out
        (both are counted), `error` stops.
      vocab_size: Tokens of the model that the examples are for; None checks none.
      tasks: Names in the order of their ids, for data that must agree with others (evaluation with training); None
        numbers them as they first occur.
      scratch: Folder for the files of tokens and masks, 5 bytes a token, which vanish with the `Examples`; None takes
        the system's (`TMPDIR`).

    Raises:
      DataError: At the first record that cannot be used or has a token beyond the vocabulary, named by file and
        line; for a task that `tasks` does not have; and when a source has no example left.
      ValueError: If `max_length` is under 2 or `overlong` is none of the three.
      OSError: If `scratch` is missing or full.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and the one it predicts), got {max_length}")
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    if not sources:
        raise DataError("no data was named; give at least one [TASK=]PATH[:WEIGHT]")
    tokenization = as_tokenization(tokenizer)
    names = tuple(tasks) if tasks is not None else tuple(dict.fromkeys(source.task for source in sources))
    counts = []
    with tempfile.TemporaryFile(dir=scratch) as tokens, tempfile.TemporaryFile(dir=scratch) as learned:
        writer = ExampleWriter(tokens, learned)
        for index, source in enumerate(sources):
            if source.task not in names:
                raise DataError(
                    f"{source.path}: the task {source.task!r} is not one of {', '.join(names)}; write TASK=PATH"
                )
            keep = functools.partial(writer.add, index)
            counts.append(_load_source(source, tokenization, max_length, overlong, vocab_size, keep))
        return writer.finish(tuple(sources), names, tuple(counts))


def _load_source(
    source: DataSource,
    tokenization: Tokenization,
    max_length: int,
    overlong: str,
    vocab_size: int | None,
    keep: Callable[[Encoded], None],
) -> SourceCounts:
    kept = read = truncated = dropped = empty = shortened = said = hidden = 0
    for where, record in read_records(source):
        read += 1
        example = encode_record(record, tokenization, where)
        said, hidden, shortened = said + example.said, hidden + example.hidden, shortened + (example.hidden > 0)
        if vocab_size is not None:
            check_tokens(example.tokens, vocab_size, where, tokenization.tokenizer)
        if not example.learned[1:].any():  # nothing predicts the first token
            empty += 1
            continue
        length = len(example.tokens)
        if length > max_length:
            if overlong == "error":
                raise DataError(
                    f"{where}: {length} tokens, more than {max_length}; shorten it, or truncate or drop such examples"
                )
            prompt_length = min(example.prompt_length, max_length)
            example = Encoded(example.tokens[:max_length], example.learned[:max_length], prompt_length)
            if overlong == "drop" or not example.learned[1:].any():
                dropped += 1
                continue
            truncated += 1
        kept += 1
        keep(example)
    if not kept:
        raise DataError(
            f"{source.path}: none of its {read} examples can be used: {dropped} are over {max_length} tokens,"
            f" {empty} have nothing to learn; raise the sequence length or mend the file"
        )
    if shortened:
        _LOGGER.warning(
            "%s: %d of %d examples: the chat template cuts %d of %d characters of the answers away (reasoning before"
            " </think>, for example), which are not learned",
            *(source.path, shortened, read, hidden, said),
        )
    return SourceCounts(read, kept, truncated, dropped, empty, shortened)


class ExampleWriter:
    """Takes examples one by one: tokens and masks into two files, a few numbers of each into memory."""

    def __init__(self, tokens: IO[bytes], learned: IO[bytes]):
        self._tokens, self._learned = tokens, learned
        self._ends, self._prompt_lengths, self._source_ids = array("q", [0]), array("i"), array("i")

    def add(self, source: int, example: Encoded) -> None:
        """Appends an example of the source with this index."""
        self._tokens.write(example.tokens.astype(np.int32).tobytes())
        self._learned.write(example.learned.astype(bool).tobytes())
        self._ends.append(self._ends[-1] + len(example.tokens))
        self._prompt_lengths.append(example.prompt_length)
        self._source_ids.append(source)

    def finish(
        self, sources: tuple[DataSource, ...], tasks: tuple[str, ...], counts: tuple[SourceCounts, ...]
    ) -> Examples:
        """All that was added; the files may be closed afterwards."""
        source_ids = np.array(self._source_ids, np.int32)
        task_of_source = np.array([tasks.index(source.task) for source in sources], np.int32)
        return Examples(
            tokens=_map(self._tokens, np.int32),
            learned=_map(self._learned, np.bool_),
            offsets=np.array(self._ends, np.int64),
            prompt_lengths=np.array(self._prompt_lengths, np.int32),
            source_ids=source_ids,
            task_ids=task_of_source[source_ids],
            sources=sources,
            tasks=tasks,
            counts=counts,
        )


def _map(file: IO[bytes], dtype: Any) -> np.ndarray:
    """The file as a read-only array that the system pages in where it is read; lives on when the file is closed."""
    file.flush()
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
