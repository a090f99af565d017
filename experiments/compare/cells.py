"""Figures that are computed once and kept, so that a long comparison can be stopped and repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Cells:
    """Named figures in a folder, each in a file with the settings that it was made under."""

    def __init__(self, folder: Path, settings: Any):
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))  # as a file gives them back

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept figures if they were made under these settings, else those of `make`."""
        path = self._folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == self._settings:
                return found["figures"]
        figures = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps({"settings": self._settings, "figures": figures}), encoding="utf-8")
        os.replace(beside, path)
        print(name, figures, flush=True)
        return figures
