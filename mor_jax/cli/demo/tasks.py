"""The demo's multi-task set: five rewritings of one and the same string of letters, so that the tasks pull apart.

    reverse:bkdz=zdkb    sort:bkdz=bdkz    shift:bkdz=clea    double:bkdz=bbkkddzz    skip:bkdz=bd

Only the first word tells the tasks apart. Every string is asked in all tasks, and a string is in the training files or
in the held-out ones, never in both: no held-out row has an input that training showed in any task.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path

LETTERS = string.ascii_lowercase
LENGTHS = (4, 5, 6)  # of the strings, evenly
NEXT = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True))

TASKS: Mapping[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "shift": lambda text: "".join(NEXT[letter] for letter in text),
    "double": lambda text: "".join(2 * letter for letter in text),
    "skip": lambda text: text[::2],
}


def make_strings(count: int, seed: int) -> list[str]:
    """`count` different strings of different letters; the same seed gives the same list on every machine.

    Args:
      count: how many.
      seed: of the generator.
    """
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.sample(LETTERS, LENGTHS[len(found) % len(LENGTHS)]))] = None
    return list(found)


def make_records(strings: list[str], task: str) -> list[dict[str, str]]:
    """One {"prompt": "TASK:STRING=", "completion": answer, "task": TASK} for each string."""
    rewrite = TASKS[task]
    return [{"prompt": f"{task}:{text}=", "completion": rewrite(text), "task": task} for text in strings]


def write_tasks(directory: Path, sizes: Mapping[str, int], seed: int) -> dict[str, dict[str, Path]]:
    """Writes `PART/TASK.jsonl` for every part and task; no string is in two parts.

    Args:
      directory: where the folders are made.
      sizes: strings of each part, for example {"train": 1000, "held_out": 100}; each is asked in every task.
      seed: of the strings.

    Returns:
      {part: {task: file}}.
    """
    strings = make_strings(sum(sizes.values()), seed)
    files: dict[str, dict[str, Path]] = {}
    for part, size in sizes.items():
        own, strings = strings[:size], strings[size:]
        (directory / part).mkdir(parents=True, exist_ok=True)
        files[part] = {task: directory / part / f"{task}.jsonl" for task in TASKS}
        for task, path in files[part].items():
            lines = [json.dumps(record) for record in make_records(own, task)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files
