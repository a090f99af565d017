"""Where records come from: JSONL, JSON lists, CSV and Parquet files, saved `datasets` folders and hub datasets.

A source is named `[TASK=]PATH[:WEIGHT]`. Reading yields `(where, record)` pairs, where `where` is what a person needs
to find the record again: `file.jsonl:17` for a line, `file.parquet: row 17` where a file has no lines. Text formats are
parsed here rather than by `datasets`, whose readers lose line numbers; saved folders and the hub go through it, and
Parquet through the Arrow beneath it.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

HUB_PREFIX = "hub:"
_PARQUET_ROWS = 256  # that are in memory at a time, beside what Arrow decodes of their row group
_TASK_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) and .parquet"


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the line or row, and what to do."""


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
    if text and Path(text).exists():
        return DataSource(text)
    task, sign, path = text.partition("=")
    if not sign or not _TASK_NAME.fullmatch(task):
        task, path = "default", text
    weight = 1.0
    head, sign, tail = path.rpartition(":")
    if sign and not Path(path).exists() and head and head != HUB_PREFIX.rstrip(":"):
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
    """Each record of the source with the place it stands at, in file order.

    Raises:
      DataError: If the file is missing, of no known format or empty, or at the first record that is not an object with
        fields.
    """
    empty = True
    for where, record in _raw_records(source):
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with fields, found {type(record).__name__}; write {{...}}")
        yield where, record
    if empty:
        raise DataError(f"{source.path}: no records in it")


def _raw_records(source: DataSource) -> Iterator[tuple[str, Any]]:
    if source.path.startswith(HUB_PREFIX):
        return _read_hub(source.path)
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"{path}: no such file; give a path, or {HUB_PREFIX}owner/name for a hub dataset")
    if path.is_dir():
        return _read_folder(path)
    reader = _READERS.get(_ending(path))
    if reader is None:
        raise DataError(f"{path}: unknown format; known are {_FORMATS}")
    return reader(path)


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a UTF-8 file without byte-order mark; other bytes are an error with their line."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason}); convert the file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); get it again") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise DataError(f"{path}:{number}: not valid JSON ({error}); mend or delete this line") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(line for _, line in _lines(path))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; with one object per line, name it .jsonl" if error.msg == "Extra data" else "; mend the file"
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend the file") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of objects, found {type(records).__name__}; write [{{...}}, ...]")
    for number, record in enumerate(records, 1):
        yield f"{path}: item {number}", record


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, strict=True, delimiter="\t" if _ending(path) == ".tsv" else ",")
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is short for documents; put back below
    start, header = 1, None
    try:
        for row in reader:
            if header is None:
                header = _header(path, row)
            elif row and len(row) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(row)} columns where the header has {len(header)}; check the quotes"
                )
            elif row:
                yield f"{path}:{start}", dict(zip(header, row, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid CSV ({error}); mend or delete this line") from None
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the column {twice[0]!r} is there twice; rename one")
    return names


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet  # slow to import, and needed here only

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS):  # `datasets` reads a large part of a file ahead
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); write it again") from None


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except IndexError:  # what `datasets` raises for a folder of no rows
        raise DataError(f"{path}: no records in it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder of `datasets.save_to_disk` ({_first_line(error)})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {', '.join(map(str, rows))}; name the folder of one of them")
    for number, record in enumerate(rows, 1):
        yield f"{path}: row {number}", dict(record)


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    dataset, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    owner, *rest = dataset.split("/")
    identity, config = "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None
    try:
        rows = datasets.load_dataset(identity, config, split=split or "train")
    except Exception as error:  # the hub client raises its own, network and parsing errors of many kinds
        raise DataError(f"{name}: cannot be loaded ({_first_line(error)}); check name, split and network") from error
    for number, record in enumerate(rows, 1):
        yield f"{name}: row {number}", dict(record)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
