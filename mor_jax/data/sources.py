"""Where records come from: JSONL, JSON lists, CSV, TSV and Parquet files, saved `datasets` folders and hub datasets.

A source is named `[TASK=]PATH[:WEIGHT]`. Reading yields `(where, record)` pairs, where `where` is what a person needs
to find the record again: `file.jsonl:17` for a line, `file.parquet: row 17` where a file has no lines.

A record says the same in every format: what is null is a field that is not there, at any depth, since the rows of a
table all have all columns; and a list of messages or options may be written as JSON text.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mor_jax.data.formats import HUB_PREFIX, DataError, read_path

_TASK_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LISTS = ("messages", "options", "choices", "history")  # fields that tables of text hold as JSON


@dataclass(frozen=True)
class DataSource:
    """One file, folder or hub dataset of a mixture.

    Attributes:
      path: A file, a folder written by `datasets.save_to_disk`, or `hub:owner/name[/config][@split]`.
      task: Name of the task; sources with one name share one task id.
      weight: How often each of its examples occurs per epoch: 2 is twice, 0.5 every second epoch.

    Raises:
      DataError: If the weight is not a positive number or the task name has characters other than letters, digits and
        `_.-`.
    """

    path: str
    task: str = "default"
    weight: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"{self.path}: the weight must be a positive number, got {self.weight}")
        if not _TASK_NAME.fullmatch(self.task):
            raise DataError(
                f"{self.path}: the task name {self.task!r} may only have letters, digits and the signs _ . -"
            )

    @property
    def stem(self) -> str:
        """The file name without folder and endings, in characters that a task name may have."""
        name = self.path.removeprefix(HUB_PREFIX).rstrip("/").rsplit("/", 1)[-1]
        return re.sub(r"[^A-Za-z0-9_-]", "_", name.split(".", 1)[0]) or "default"


def parse_source(text: str) -> DataSource:
    """The `DataSource` named by `[TASK=]PATH[:WEIGHT]`; without `TASK=` the task is `default`.

    A text that is the name of an existing file is taken whole, so that odd file names stay usable. `~/` at the
    beginning of a path is the home folder.

    >>> parse_source("math=data/gsm.jsonl:0.5")
    DataSource(path='data/gsm.jsonl', task='math', weight=0.5)

    Raises:
      DataError: If the path is empty, the task name or the weight is not usable.
    """
    if text and os.path.exists(text):  # unlike `Path.exists` it raises nothing
        return DataSource(text)
    task, sign, path = text.partition("=")
    if not sign or not _TASK_NAME.fullmatch(task):
        task, path = "default", text
    weight = 1.0
    head, sign, tail = path.rpartition(":")
    if sign and not os.path.exists(path) and head and head != HUB_PREFIX.rstrip(":"):
        try:
            path, weight = head, float(tail)
        except ValueError:
            raise DataError(f"{text}: the weight after ':' must be a number, got {tail!r}") from None
    if not path:
        raise DataError(f"{text!r} names no file; write [TASK=]PATH[:WEIGHT]")
    return DataSource(os.path.expanduser(path) if path.startswith("~/") else path, task, weight)


def parse_sources(texts: Sequence[str]) -> tuple[DataSource, ...]:
    """The sources named by several texts; where there are several, one without `TASK=` takes its file's stem as task.

    Raises:
      DataError: If a text is not usable, or two files without `TASK=` have the same stem (they could not be told
        apart).
    """
    sources = [parse_source(text) for text in texts]
    if len(sources) < 2:
        return tuple(sources)
    unnamed = [index for index, source in enumerate(sources) if source.task == "default"]
    unnamed = [index for index in unnamed if not texts[index].startswith("default=")]
    for index in unnamed:
        stem = sources[index].stem
        if any(other != index and sources[other].task == stem for other in range(len(sources))):
            raise DataError(f"{sources[index].path}: the task name {stem!r} is taken; name it yourself: TASK=PATH")
        sources[index] = replace(sources[index], task=stem)
    return tuple(sources)


def read_records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of the source with the place it stands at, in file order, without what is null.

    Raises:
      DataError: If the file is missing, unreadable, of no known format or empty, or at the first record that is not an
        object with fields.
    """
    empty = True
    for where, record in read_path(source.path):
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields, found {type(record).__name__}; write {{...}}")
        yield where, _present(record)
    if empty:
        raise DataError(f"{source.path}: no records in it")


def _present(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there, lists that were written as text read."""
    fields = {name: _without_nulls(value) for name, value in record.items() if value is not None}
    for name in _LISTS:
        value = fields.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):  # who needs a list says what it found instead
                fields[name] = _without_nulls(json.loads(value))
    return fields


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
