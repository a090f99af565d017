"""Checksums of every file of a checkpoint, adapter or export, written last and verified before anything is read.

The readers underneath hand out flipped bits without a word, so a folder carries `manifest.json`:

    {"version": 1, "files": {"adapter.safetensors": {"size": 4096, "sha256": "…"}, …}, "sha256": "…"}

Its own hash, over the lines before it, comes last. A folder without a manifest was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_VERSION = 1


class IntegrityError(RuntimeError):
    """A folder does not agree with its manifest; `bad` names the files."""

    exit_code = 3

    def __init__(self, directory: str | Path, bad: list[str]):
        self.directory = Path(directory)
        self.bad = bad
        super().__init__(f"{directory}: {len(bad)} bad file(s): {', '.join(bad)}: restore them from another copy")


def write_manifest(directory: str | Path) -> Path:
    """Writes `manifest.json` for every file below `directory`, durably: the last act of any save.

    Returns:
      Path of the manifest. It is written beside and renamed, so that a killed process leaves none or a whole one.
    """
    directory = Path(directory)
    files = {}
    for path in _files(directory):
        size, digest = file_digest(path)
        files[path.relative_to(directory).as_posix()] = {"size": size, "sha256": digest}
    body: dict[str, Any] = {"version": _VERSION, "files": files}
    text = json.dumps(body | {"sha256": _body_digest(body)}, indent=1) + "\n"
    target = directory / MANIFEST
    beside = target.with_suffix(".json.tmp")
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, target)
    return target


def verify_manifest(directory: str | Path) -> list[str]:
    """Names of the files that are missing, new, of another size or of another content; empty when all is well.

    The manifest itself is among them when it is missing, unreadable or changed.
    """
    directory = Path(directory)
    body = _read_manifest(directory)
    if body is None:
        return [MANIFEST]
    bad = []
    for name, entry in body["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size"] or file_digest(path)[1] != entry["sha256"]:
            bad.append(name)
    present = {path.relative_to(directory).as_posix() for path in _files(directory)}
    return bad + sorted(present - set(body["files"]))


def check_manifest(directory: str | Path) -> None:
    """Returns when `directory` agrees with its manifest.

    Raises:
      IntegrityError: names every file that does not.
    """
    bad = verify_manifest(directory)
    if bad:
        raise IntegrityError(directory, bad)


def file_digest(path: str | Path) -> tuple[int, str]:
    """(size in bytes, SHA-256 in hex) of a file, read in pieces."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def _files(directory: Path) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in found if path.parent != directory or not path.name.startswith(MANIFEST))


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest less its own hash, or None when it cannot be trusted."""
    try:
        body = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        claimed = body.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    if claimed != _body_digest(body) or body.get("version") != _VERSION:
        return None
    return body
