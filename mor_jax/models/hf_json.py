"""Typed reading of the JSON files in a model directory: every complaint names the file and the field.

Types are those that transformers insists on: a float is written with a point, a bool is no number, and null is a value
of its own.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)


class ModelFileError(ValueError):
    """A file of a model directory is missing, malformed, or does not fit; the message names file and part."""


@dataclass(frozen=True)
class JsonReader:
    """Typed access to one JSON object.

    Attributes:
      path: Of its file.
      values: What the file says.
      defaults: What holds where it is silent.
      within: Of which field of the file the object is the value; empty for the whole file.
    """

    path: Path
    values: dict[str, Any]
    defaults: dict[str, Any]
    within: str = ""

    def fail(self, name: str, problem: str) -> ModelFileError:
        """The error to raise about a field."""
        return ModelFileError(
            f"{self.path}: field {name!r} {problem}" + (f" (in {self.within})" if self.within else "")
        )

    def ignore(self, names: list[str], reason: str) -> None:
        """Logs that these fields have no effect, for a reason that follows a colon; nothing without names."""
        if names:
            listed = ", ".join(repr(name) for name in names)
            fields, verb = ("field", "is") if len(names) == 1 else ("fields", "are")
            where = f" of {self.within}" if self.within else ""
            _LOGGER.warning("%s: %s %s%s %s ignored: %s", self.path, fields, listed, where, verb, reason)

    def get(self, name: str, kind: type, default: Any = None, *, required: bool = False, nullable: bool = False) -> Any:
        """The field as a `kind`; its default where it is absent, None where it is null and may be.

        Raises:
          ModelFileError: it is of another kind, null without being `nullable`, or `required` and not there.
        """
        if name not in self.values:
            default = self.defaults.get(name, default)
            if default is None and required:
                raise self.fail(name, f"is missing; a {kind.__name__} is needed")
            return default
        value = self.values[name]
        if value is None and nullable:
            return None
        if value is None:
            raise self.fail(name, f"is {'missing' if required else 'null'}; a {kind.__name__} is needed")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            written = f": write {float(value)!r}" if kind is float and type(value) is int else ""
            raise self.fail(name, f"must be a {kind.__name__}, got {value!r}{written}")
        if kind is float and not math.isfinite(value):
            raise self.fail(name, f"must be a finite number, got {value!r}")
        return value

    def count(self, name: str, *, required: bool = True, nullable: bool = False) -> int | None:
        """The field as a whole number of at least 1, else as `get` says.

        Raises:
          ModelFileError: as `get`, or the number is below 1.
        """
        value = self.get(name, int, required=required, nullable=nullable)
        if value is not None and value < 1:
            raise self.fail(name, f"must be at least 1, got {value}")
        return value

    def number(self, name: str, default: float | None = None, *, nullable: bool = False) -> float | None:
        """The field as a finite number, written with or without a point; its default where it is absent.

        Raises:
          ModelFileError: it is no such number, null without being `nullable`, or absent and without a default.
        """
        value = self.values.get(name)
        if value is None and name not in self.values and (nullable or default is not None):
            return default
        if value is None and nullable:
            return None
        if value is None:
            raise self.fail(name, f"is {'null' if name in self.values else 'missing'}; a number is needed")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(name, f"must be a finite number, got {value!r}")
        return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ModelFileError: the file is missing or unreadable, is not JSON, or holds something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file{_instead(path)}") from None
    except OSError as error:  # a file in place of the folder, among others
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path}: a JSON object is needed, found a {type(values).__name__}")
    return values


def _instead(path: Path) -> str:
    """What lies in the folder of a missing config.json and tells what the folder is."""
    if path.name != "config.json":
        return ""
    if (path.parent / "adapter_config.json").is_file():
        return (
            "; adapter_config.json says that this is an adapter of PEFT: name its base model, "
            "or merge the adapter into it with merge_and_unload() and save that"
        )
    if (path.parent / "params.json").is_file():
        return "; params.json is of another format: convert the model to that of Hugging Face"
    return ""
