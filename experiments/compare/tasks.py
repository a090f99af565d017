"""Six tasks of public instruction data as prompt, answer and options; see `TASKS` for where each comes from.

The data folder holds `superni/TASK/{task.json,train.jsonl,test.jsonl}` (Super-NaturalInstructions: a definition, then
the input), `t0/PROMPT.jsonl` (T0: prompt and completion, no split of its own) and `commonsense/TASK/{train,test}.json`
(LLM-Adapters' commonsense tasks: instruction and answer). Rows keep their order; no row is in two parts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # prompt, completion, options (None where the answer is free text), task
PARTS = {"train": 400, "validation": 20, "test": 100}  # rows of each task at most; of T0's 200 rows 140, 20, 40


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from, and its closed set of answers if it has one."""

    suite: str
    source: str
    options: tuple[str, ...] | None
    read: Callable[[Path, str], tuple[list[tuple[str, str]], list[tuple[str, str]]]]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _super_natural(folder: Path, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    definition = json.loads((folder / "superni" / name / "task.json").read_text(encoding="utf-8"))["definition"][0]
    parts = []
    for part in ("train", "test"):
        rows = _lines(folder / "superni" / name / f"{part}.jsonl")
        parts.append([(f"{definition}\n{row['input']}\nAnswer:", row["output"][0]) for row in rows])
    return parts[0], parts[1]


def _t0(folder: Path, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    rows = [(f"{row['prompt'].strip()}\nAnswer:", row["completion"]) for row in _lines(folder / "t0" / f"{name}.jsonl")]
    return rows[:160], rows[160:]


def _commonsense(folder: Path, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    parts = []
    for part in ("train", "test"):
        rows = json.loads((folder / "commonsense" / name / f"{part}.json").read_text(encoding="utf-8"))
        parts.append([(f"{row['instruction']}\nAnswer:", row["answer"]) for row in rows])
    return parts[0], parts[1]


EMOTIONS = ("anger", "fear", "joy", "love", "sadness", "surprise")
ANSWERS = ("answer1", "answer2", "answer3", "answer4")
TASKS = {
    "sst2": Task("Super-NI", "task363_sst2_polarity_classification", ("NEG", "POS"), _super_natural),
    "emotion": Task("Super-NI", "task875_emotion_classification", EMOTIONS, _super_natural),
    "qqp": Task("T0", "glue_qqp_answer", ("no", "yes"), _t0),
    "quartz": Task("T0", "quartz_given_the_fact_answer_the_q", None, _t0),
    "boolq": Task("commonsense", "boolq", ("false", "true"), _commonsense),
    "arc_easy": Task("commonsense", "ARC-Easy", ANSWERS, _commonsense),
}


def read_parts(folder: Path, name: str) -> dict[str, list[Row]]:
    """The rows of a task, {"train", "validation", "test"}.

    Test rows whose prompt is in training are left out. A closed task's rows with another answer than its options (four
    options of ARC-Easy are kept, a fifth is not) are left out too.
    """
    task = TASKS[name]
    first, last = task.read(folder, task.source)

    def rows(pairs: list[tuple[str, str]]) -> list[Row]:
        kept = [pair for pair in pairs if task.options is None or pair[1] in task.options]
        options = task.options and [f" {option}" for option in task.options]
        return [{"prompt": p, "completion": f" {c.strip()}", "options": options, "task": name} for p, c in kept]

    learned = rows(first)
    held = min(PARTS["validation"], len(learned) // 4)
    train, validation = learned[:-held][: PARTS["train"]], learned[-held:]
    seen = {row["prompt"] for row in learned}
    return {
        "train": train,
        "validation": validation,
        "test": [row for row in rows(last) if row["prompt"] not in seen][: PARTS["test"]],
    }


def write_parts(folder: Path, data: Path) -> dict[str, dict[str, list[Row]]]:
    """The rows of every task, also written to `folder`/PART/TASK.jsonl for `mor train`."""
    found = {name: read_parts(data, name) for name in TASKS}
    for name, parts in found.items():
        for part, rows in parts.items():
            path = folder / part / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return found


def checksum(rows: list[Row]) -> int:
    """CRC-32 of rows, so that a table can say which they were."""
    return zlib.crc32(json.dumps(rows).encode())
