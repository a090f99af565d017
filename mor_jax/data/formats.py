"""Readers of files and datasets: (place, record) pairs from JSONL, JSON, CSV, TSV, Parquet, saved folders and the hub.

Text formats are parsed here rather than by `datasets`, whose readers lose line numbers; saved folders and the hub go
through it, and Parquet through the Arrow beneath it. In `.tsv` a line is a record and quotes are letters, as in the
files of GLUE; a number whose column names its classes carries its name.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

HUB_PREFIX = "hub:"
_PARQUET_ROWS = 256  # that are in memory at a time, beside what Arrow decodes of their row group
_FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz) and .parquet"
_KINDS = ({"messages"}, {"prompt", "completion"}, {"instruction", "output"}, {"text"}, {"sentence"}, {"sentence1"})
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_LOGGER = logging.getLogger(__name__)


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the line or row, and what to do."""


class NamedClass(int):
    """The number of a class whose column names its classes, a `ClassLabel` of `datasets`; `names` are all of them."""

    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...]):
        """The number, with the names of all classes of its column."""
        made = super().__new__(cls, number)
        made.names = names
        return made

    @property
    def name(self) -> str:
        """The name of this class."""
        return self.names[self]


def read_path(name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) for all that stands in a file, folder or hub dataset; records may be of any type.

    Raises:
      DataError: If it is missing, unreadable or of no known format, or where it is damaged.
    """
    if name.startswith(HUB_PREFIX):
        return _read_hub(name)
    path = Path(name)
    if not os.path.exists(path):
        state = "a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise DataError(f"{path}: {state}; give a path, or {HUB_PREFIX}owner/name for a hub dataset")
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
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


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


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of cells under a header; columns without a name are left out, empty cells beyond the header ignored.

    An empty cell is an empty text; where the columns serve several kinds of record it is a field that is not there.
    """
    is_tsv = _ending(path) == ".tsv"
    hint = "a record is one line, and quotes are letters" if is_tsv else "check the quotes"
    header, several = None, False
    for line, cells in _tsv_rows(path) if is_tsv else _csv_rows(path):
        if header is None:
            header = _header(path, line, cells)
            several = sum(kind <= set(header) for kind in _KINDS) > 1
            continue
        width = len(header)
        if len(cells) < width or any(cells[width:]):
            raise DataError(f"{path}:{line}: {len(cells)} columns where the header has {width}; {hint}")
        named = zip(header, cells[:width], strict=True)
        yield f"{path}:{line}", {name: cell for name, cell in named if name and (cell or not several)}


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, cells) of each row that is not blank."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is short for documents; put back below
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid CSV ({error}); mend or delete this line") from None
    finally:
        csv.field_size_limit(limit)


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line that is not blank; nothing but tabs and ends of lines has a meaning."""
    told = False
    for number, line in _lines(path):
        row = line.removesuffix("\n").removesuffix("\r").split("\t")
        if not told and any(map(_is_quoted, row)):
            told = True
            _LOGGER.warning("%s:%d: quotes in .tsv are letters, doubled ones too; write .csv to quote", path, number)
        if row != [""]:
            yield number, row


def _is_quoted(cell: str) -> bool:
    """Whether the cell looks as if a CSV writer had put it into quotes and doubled those within."""
    inner = cell[1:-1]
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if any("\r" in name for name in names):
        raise DataError(f"{path}:{line}: a carriage return in the header; end lines with a line feed")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:{line}: the column {twice[0]!r} is there twice; rename one")
    return names


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet  # slow to import, and needed here only

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            named, number = _classes_of(path, file.schema_arrow), 0
            for batch in file.iter_batches(_PARQUET_ROWS):  # `datasets` reads a large part of a file ahead
                for record in batch.to_pylist():
                    number += 1
                    kept = {name: value for name, value in record.items() if not _PANDAS_INDEX.fullmatch(name)}
                    yield f"{path}: row {number}", _with_names(kept, named)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); write it again") from None


def _classes_of(path: Path, schema: Any) -> dict[str, tuple[str, ...]]:
    """Column -> names of its classes, where `datasets` wrote the file and the column has some."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        return _class_columns(datasets.Features.from_arrow_schema(schema))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: its description by `datasets` is unreadable ({_first_line(error)})") from None


def _class_columns(features: Any) -> dict[str, tuple[str, ...]]:
    import datasets

    return {name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _with_names(record: dict[str, Any], named: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The record with a `NamedClass` for each number of a class that has a name."""
    own = {name: record.get(name) for name in named}
    in_range = {name: value for name, value in own.items() if value is not None and 0 <= value < len(named[name])}
    return record | {name: NamedClass(value, named[name]) for name, value in in_range.items()}


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
    yield from _dataset_rows(str(path), rows)


def _dataset_rows(name: str, rows: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a dataset in Python's types, whatever format was set on it, and with all columns."""
    rows = rows.with_format(None)
    named = _class_columns(rows.features)
    for number, record in enumerate(rows, 1):
        kept = {field: value for field, value in record.items() if not _PANDAS_INDEX.fullmatch(field)}
        yield f"{name}: row {number}", _with_names(kept, named)


def _read_hub(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    dataset, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    owner, *rest = dataset.split("/")
    identity, config = "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None
    try:
        rows = datasets.load_dataset(identity, config, split=split or "train")
    except Exception as error:  # the hub client raises its own, network and parsing errors of many kinds
        raise DataError(f"{name}: cannot be loaded ({_first_line(error)}); check name, split and network") from error
    yield from _dataset_rows(name, rows)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
