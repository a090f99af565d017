"""Results as people read them: lists of records become tables, the rest lines of name and value."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from mor_jax.cli.plan import readable

WIDTH = 140  # columns where stdout is no terminal


def print_result(command: str, result: Any) -> None:
    """Prints what a command returned on stdout; text that a model wrote is printed as it is."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if command == "generate":
        print(result["text"])
        return
    if command == "plan":
        result = readable(result)
    if isinstance(result, list):
        console.print(records_table(result))
        return
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(records_table(value, name))
        elif isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            console.print(records_table([{"": key} | item for key, item in value.items()], name))
        else:
            console.print(f"{name.replace('_', ' ')}: {cell(value)}", markup=False, soft_wrap=True)


def records_table(records: list[dict[str, Any]], title: str | None = None) -> Table:
    """A table with a row for each record and a column for each key that any of them has."""
    names = list(dict.fromkeys(name for record in records for name in record))
    table = Table(title=title)
    for name in names:
        numeric = all(isinstance(record.get(name, 0), int | float) for record in records)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for record in records:
        table.add_row(*(cell(record.get(name, "")) for name in names))
    return table


def cell(value: Any) -> str:
    """One value in few signs: four digits for fractions, thousands separated, lists and mappings in a line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " x ".join(map(cell, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(cell, value))
    return "-" if value is None else str(value)
