"""Batches that approximate merges are fitted on, and others, of other examples, that they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.cli.opening import LiveModel
from mor_jax.cli.options import path_texts
from mor_jax.data import (
    DataError,
    Examples,
    build_row,
    load_examples,
    load_labelled,
    pack,
    parse_sources,
    stack_rows,
)
from mor_jax.models import EncoderConfig

ROWS = 4  # of a batch, or as many more as the devices share evenly
UNNAMED = "default"  # the task of a source without a name
Batches = list[dict[str, np.ndarray]]


def merge_batches(
    live: LiveModel, tokenizer: Any, calibration: str | Sequence[str], count: int
) -> tuple[Batches, Batches]:
    """(calibration batches, held-out batches), at most `count` of each, that share no example.

    Args:
      live: The run; its task names number the tasks.
      tokenizer: Of its base.
      calibration: `[TASK=]PATH[:WEIGHT]`, one or several; empty takes the run's training data. Where the run has
        `eval_data`, held-out batches are of that; else the calibration examples are dealt alternately to the two.
      count: Batches of each.

    Raises:
      DataError: A record is not usable or has a token that the model has not, or there are too few different examples.
    """
    assert live.train is not None
    texts = path_texts(calibration) if calibration else live.train.data
    examples, length = live_examples(live, tokenizer, texts)
    chosen, rows = _different(examples), live.padded_rows(ROWS)
    if live.train.eval_data and not calibration:
        held_out, _ = live_examples(live, tokenizer, live.train.eval_data)
        seen = {_content(examples, index) for index in chosen}
        unseen = [index for index in _different(held_out) if _content(held_out, index) not in seen]
        if unseen:
            return _batches(examples, chosen, length, count, rows), _batches(held_out, unseen, length, count, rows)
    if len(chosen) < 2:
        raise DataError(f"{', '.join(texts)}: one example; merging needs one to fit on and another to be judged by")
    return _batches(examples, chosen[::2], length, count, rows), _batches(examples, chosen[1::2], length, count, rows)


def live_examples(live: LiveModel, tokenizer: Any, texts: Sequence[str]) -> tuple[Examples, int]:
    """The examples of the sources `texts` as the run was trained on such, and the length of its rows."""
    assert live.train is not None
    length, tasks, size = live.train.sequence_length, live.tasks or None, live.config.vocab_size
    sources = parse_sources(texts)
    if tasks and any(source.task == UNNAMED for source in sources):
        tasks = tuple(dict.fromkeys((*tasks, UNNAMED)))  # a plain file stands for all tasks and counts for none
    if isinstance(live.config, EncoderConfig):
        length = min(length, live.config.max_length)
        labels = live.config.labels
        return load_labelled(sources, tokenizer, length, labels=labels, tasks=tasks, vocab_size=size)[0], length
    return load_examples(sources, tokenizer, length, tasks=tasks, vocab_size=size), length


def _content(examples: Examples, index: int) -> bytes:
    return examples.tokens[examples.offsets[index] : examples.offsets[index + 1]].tobytes()


def _different(examples: Examples) -> list[int]:
    """Examples without repetitions, sources in turns, so that a few of them hold every task."""
    first: dict[bytes, int] = {}
    for index in range(len(examples)):
        first.setdefault(_content(examples, index), index)
    place: dict[int, int] = {}
    ranked = []
    for index in first.values():
        source = int(examples.source_ids[index])
        place[source] = place.get(source, 0) + 1
        ranked.append((place[source] // 2, source, place[source], index))  # pairs, so that each half has every source
    return [entry[-1] for entry in sorted(ranked)]


def _batches(examples: Examples, members: Sequence[int], length: int, count: int, rows: int) -> Batches:
    """Packed rows of these examples, `count * ROWS` at most, in batches of `rows`; empty rows fill them up.

    Where many devices make a batch larger than all of them, they go to two, so that one can choose and one report.
    """
    lengths = examples.lengths[list(members)]
    alone = [[item] for item in range(len(members))]  # a class belongs to a whole row
    filled = (pack(lengths, length) if examples.labels is None else alone)[: count * ROWS]
    share = min(rows, max(ROWS, -(-len(filled) // 2)))
    built = [build_row(examples, np.array([members[item] for item in row], np.int64), length) for row in filled]
    empty = build_row(examples, np.array([], np.int64), length)
    parts = [built[start : start + share] for start in range(0, len(built), share)]
    return [stack_rows([*part, *[empty] * (rows - len(part))]) for part in parts]
