"""Labelled texts to examples with a class, and no token, to be learned.

{"text" or "sentence": ..., "label": ...}    or    {"sentence1": ..., "sentence2": ... (may be absent), "label": ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mor_jax.data.examples import OVERLONG, Examples, Overlong, SourceCounts
from mor_jax.data.sources import DataError, DataSource, read_records

TEXT_FIELDS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("sentence1",))


class _Labelled(NamedTuple):
    tokens: list[int]
    second_start: int
    label: int | str
    where: str


def load_labelled(
    sources: Sequence[DataSource],
    tokenizer: Any,
    max_length: int,
    overlong: Overlong = "truncate",
    *,
    labels: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
) -> tuple[Examples, tuple[str, ...]]:
    """Reads, tokenises and checks every labelled record of the sources.

    Args:
      sources: What to read, in this order.
      tokenizer: A fast Hugging Face tokenizer; it puts its own marks around a text and between those of a pair.
      max_length: The most tokens of an example, those marks included.
      overlong: What happens to longer ones: `truncate` shortens the longer text, `drop` leaves them out (both are
        counted), `error` stops.
      labels: Names of the classes in the order of their ids; empty takes those that occur, sorted. A label that is a
        whole number and no name of a class is its id.
      tasks: Names in the order of their ids; None numbers them as they first occur.

    Returns:
      (examples, names of the classes).

    Raises:
      DataError: At the first record that cannot be used, named by file and line; for fewer than two classes; and when a
        source has no example left.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    task_names = tuple(tasks) if tasks is not None else tuple(dict.fromkeys(source.task for source in sources))
    kept: list[_Labelled] = []
    source_ids: list[int] = []
    counts = []
    for index, source in enumerate(sources):
        if source.task not in task_names:
            raise DataError(f"{source.path}: the task {source.task!r} is not one of {', '.join(task_names)}")
        examples, count = _load_source(source, tokenizer, max_length, overlong)
        kept += examples
        source_ids += [index] * len(examples)
        counts.append(count)
    names = tuple(labels) or _names(kept)
    if len(names) < 2:
        raise DataError(f"{sources[0].path}: a classifier needs at least two classes, found {', '.join(names)}")
    return _flatten(kept, names, source_ids, tuple(sources), task_names, tuple(counts)), names


def _load_source(
    source: DataSource, tokenizer: Any, max_length: int, overlong: str
) -> tuple[list[_Labelled], SourceCounts]:
    kept: list[_Labelled] = []
    read = truncated = dropped = 0
    for where, record in read_records(source):
        read += 1
        texts, label = _texts(record, where), _label(record, where)
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
        kinds = list(encoded.get("token_type_ids") or [])
        second = kinds.index(1) if 1 in kinds else len(encoded["input_ids"])
        kept.append(_Labelled(list(encoded["input_ids"]), second, label, where))
    if not kept:
        raise DataError(
            f"{source.path}: none of its {read} examples can be used: {dropped} are over {max_length} tokens"
        )
    return kept, SourceCounts(read, len(kept), truncated, dropped, 0)


def _texts(record: Mapping[str, Any], where: str) -> list[str]:
    for names in TEXT_FIELDS:
        if all(record.get(name) is not None for name in names):
            texts = [record[name] for name in names]
            break
    else:
        has = ", ".join(map(str, record)) or "(none)"
        raise DataError(f"{where}: has the fields {has}; needs text or sentence, or sentence1 and sentence2")
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(
                f"{where}: the field {name!r} must be text, found {type(text).__name__}; write it in quotes"
            )
    return texts


def _label(record: Mapping[str, Any], where: str) -> int | str:
    label = record.get("label")
    if isinstance(label, bool):
        return int(label)
    if not isinstance(label, int | str) or label == "":
        raise DataError(f"{where}: the field 'label' must be a whole number or a name, found {label!r}")
    return label


def _names(kept: Sequence[_Labelled]) -> tuple[str, ...]:
    found = {example.label for example in kept}
    numbers = sorted(label for label in found if isinstance(label, int))
    return tuple([str(number) for number in numbers] + sorted(label for label in found if isinstance(label, str)))


def _identify(example: _Labelled, names: tuple[str, ...]) -> int:
    if str(example.label) in names:
        return names.index(str(example.label))
    if isinstance(example.label, int) and 0 <= example.label < len(names):
        return example.label
    raise DataError(
        f"{example.where}: the label {example.label!r} is not one of {', '.join(names)}; labels= names others"
    )


def _flatten(kept: list[_Labelled], names, source_ids: list[int], sources, tasks, counts) -> Examples:
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(example.tokens) for example in kept], out=offsets[1:])
    tokens = np.concatenate([np.array(example.tokens, np.int32) for example in kept])
    task_of_source = np.array([tasks.index(source.task) for source in sources], np.int32)
    return Examples(
        tokens=tokens,
        learned=np.zeros(len(tokens), bool),
        offsets=offsets,
        prompt_lengths=np.diff(offsets).astype(np.int32),
        source_ids=np.array(source_ids, np.int32),
        task_ids=task_of_source[np.array(source_ids, np.int32)],
        sources=sources,
        tasks=tasks,
        counts=counts,
        labels=np.array([_identify(example, names) for example in kept], np.int32),
        second_starts=np.array([example.second_start for example in kept], np.int32),
    )
