"""Typed reading of the JSON files in a model directory: every complaint names the file and the field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelFileError(ValueError):
    """A file of a model directory is missing, malformed, or does not fit; the message names file and part."""


@dataclass(frozen=True)
class JsonReader:
    """Typed access to one JSON object.

    Attributes:
      path: Of its file.
      values: What the file says.
      defaults: What holds where it is silent.
    """

    path: Path
    values: dict[str, Any]
    defaults: dict[str, Any]

    def fail(self, name: str, problem: str) -> ModelFileError:
        """The error to raise about a field."""
        return ModelFileError(f"{self.path}: field {name!r} {problem}")

    def get(self, name: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        """The field as a `kind`, or the default where it is absent or null.

        Raises:
          ModelFileError: it is of another kind, or required and not there.
        """
        value = self.values.get(name, self.defaults.get(name, default))
        if value is None and not required:
            return None if name in self.values else default
        if value is None:
            raise self.fail(name, f"is missing; a {kind.__name__} is needed")
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(name, f"must be a {kind.__name__}, got {value!r}")
        return kind(value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ModelFileError: the file is missing or unreadable, is not JSON, or holds something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except OSError as error:  # a file in place of the folder, among others
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path}: a JSON object is needed, found a {type(values).__name__}")
    return values
