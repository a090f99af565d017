"""Labelled texts to examples with a class, and no token, to be learned.

{"text" or "sentence": ..., "label": ...}    or    {"sentence1": ..., "sentence2": ... (may be absent), "label": ...}

`labels` says which class a label is, the same in every format. The columns of GLUE's own file of MRPC are known too.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mor_jax.data.chat import Encoded
from mor_jax.data.examples import OVERLONG, Examples, ExampleWriter, Overlong, SourceCounts
from mor_jax.data.labels import Label, class_id, class_names, read_label
from mor_jax.data.sources import DataError, DataSource, read_records
from mor_jax.data.tokenization import Tokenization, check_unicode
from mor_jax.data.vocabulary import check_tokens

TEXT_FIELDS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("sentence1",), ("#1 String", "#2 String"))


def load_labelled(
    sources: Sequence[DataSource],
    tokenizer: Any,
    max_length: int,
    overlong: Overlong = "truncate",
    *,
    labels: Sequence[str] = (),
    vocab_size: int | None = None,
    tasks: Sequence[str] | None = None,
    scratch: str | os.PathLike | None = None,
) -> tuple[Examples, tuple[str, ...]]:
    """Reads, tokenises and checks every labelled record of the sources.

    As in `load_examples`, tokens go to nameless files as they are made.

    Args:
      sources: What to read, in this order.
      tokenizer: A fast Hugging Face tokenizer, or the `Tokenization` of one; it puts its own marks around a text and
        between those of a pair.
      max_length: The most tokens of an example, those marks included.
      overlong: What happens to longer ones: `truncate` shortens the longer text, `drop` leaves them out (both are
        counted), `error` stops.
      labels: Names of the classes in the order of their ids; empty takes those that the label column has,
        else those that occur, sorted. A label that is a whole number and no name of a class is its id.
      vocab_size: Tokens of the model that the examples are for; None checks none.
      tasks: Names in the order of their ids; None numbers them as they first occur.
      scratch: Folder for those files; None takes the system's (`TMPDIR`).

    Returns:
      (examples, names of the classes).

    Raises:
      DataError: At the first record that cannot be used or has a token beyond the vocabulary, named by file and line;
        for fewer than two classes; and when a source has no example left.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, Tokenization) else tokenizer
    task_names = tuple(tasks) if tasks is not None else tuple(dict.fromkeys(source.task for source in sources))
    counts = []
    with tempfile.TemporaryFile(dir=scratch) as tokens, tempfile.TemporaryFile(dir=scratch) as learned:
        writer = _LabelledWriter(ExampleWriter(tokens, learned))
        for index, source in enumerate(sources):
            if source.task not in task_names:
                raise DataError(f"{source.path}: the task {source.task!r} is not one of {', '.join(task_names)}")
            counts.append(_load_source(index, source, tokenizer, max_length, overlong, writer, vocab_size))
        names = tuple(labels) or writer.label_names()
        if len(names) < 2:
            raise DataError(f"{sources[0].path}: a classifier needs at least two classes, found {', '.join(names)}")
        return writer.finish(names, tuple(sources), task_names, tuple(counts)), names


class _LabelledWriter:
    """Takes labelled examples one by one; which class a label is can be told when all are known."""

    def __init__(self, examples: ExampleWriter):
        self._examples = examples
        self._numbers: dict[Label, int] = {}  # label -> its number in order of appearance
        self._places: list[str] = []  # where each was first met
        self._labels, self._second_starts = array("i"), array("i")

    def add(self, source: int, tokens: np.ndarray, second_start: int, label: Label, where: str) -> None:
        self._examples.add(source, Encoded(tokens, np.zeros(len(tokens), bool), len(tokens)))
        number = self._numbers.setdefault(label, len(self._numbers))
        if number == len(self._places):
            self._places.append(where)
        self._labels.append(number)
        self._second_starts.append(second_start)

    def label_names(self) -> tuple[str, ...]:
        """Names of the classes that the labels stand for; raises DataError as `class_names`."""
        return class_names(zip(self._numbers, self._places, strict=True))

    def finish(
        self,
        names: tuple[str, ...],
        sources: tuple[DataSource, ...],
        tasks: tuple[str, ...],
        counts: tuple[SourceCounts, ...],
    ) -> Examples:
        """All that was added, each label as its place in `names`."""
        places = zip(self._numbers, self._places, strict=True)
        class_ids = np.array([class_id(label, names, where) for label, where in places], np.int32)
        return replace(
            self._examples.finish(sources, tasks, counts),
            labels=class_ids[np.array(self._labels, np.int32)],
            second_starts=np.array(self._second_starts, np.int32),
        )


def _load_source(
    index: int,
    source: DataSource,
    tokenizer: Any,
    max_length: int,
    overlong: str,
    writer: _LabelledWriter,
    vocab_size: int | None,
) -> SourceCounts:
    read = truncated = dropped = 0
    for where, record in read_records(source):
        read += 1
        texts, label = _texts(record, where), read_label(record, where)
        encoded = tokenizer(*texts)
        if len(encoded["input_ids"]) > max_length:
            if overlong == "error":
                raise DataError(
                    f"{where}: {len(encoded['input_ids'])} tokens, more than {max_length}; shorten it, or truncate or "
                    "drop such examples"
                )
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        if vocab_size is not None:
            check_tokens(encoded["input_ids"], vocab_size, where, tokenizer)
        kinds = list(encoded.get("token_type_ids") or [])
        second = kinds.index(1) if 1 in kinds else len(encoded["input_ids"])
        writer.add(index, np.array(encoded["input_ids"], np.int32), second, label, where)
    if read == dropped:
        raise DataError(
            f"{source.path}: none of its {read} examples can be used: {dropped} are over {max_length} tokens"
        )
    return SourceCounts(read, read - dropped, truncated, dropped, 0)


def _texts(record: Mapping[str, Any], where: str) -> list[str]:
    for names in TEXT_FIELDS:
        if all(record.get(name) is not None for name in names):
            texts = [record[name] for name in names if name == names[0] or record[name] != ""]
            break
    else:
        has = ", ".join(map(str, record)) or "(none)"
        raise DataError(f"{where}: has the fields {has}; needs text or sentence, or sentence1 and sentence2")
    for name, text in zip(names, texts, strict=False):  # an empty second text is none
        if not isinstance(text, str):
            raise DataError(
                f"{where}: the field {name!r} must be text, found {type(text).__name__}; write it in quotes"
            )
        check_unicode(text, f"the field {name!r}", where)
    return texts
