"""Paths of the command line: a path of the wrong kind is bad input, wherever the system refuses it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from typing import Any

from mor_jax.cli.flags import UsageError

READ = ("base", "model", "run", "path", "config")  # arguments that name one file or folder
WRITTEN = ("output_dir", "compile_cache")
_OF_A_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


def check_makeable(path: str | os.PathLike, flag: str, *, writable: bool = True) -> None:
    """Returns when `path` is a folder or may become one.

    Args:
      path: of a folder to be made or filled.
      flag: that named it, for the message.
      writable: whether this process is to write there.

    Raises:
      UsageError: it is something else, or lies in something else or where nothing may be written.
    """
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise UsageError(f"{flag} {path}: exists and is no folder; choose another")
    except FileNotFoundError:
        if os.path.islink(path):
            raise UsageError(f"{flag} {path}: is a link to what is not there; choose another folder") from None
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; choose another folder") from None
    there = os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if writable and not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: nothing may be written to {there}; choose another folder")


def blamed(error: OSError, given: Mapping[str, Any]) -> UsageError | None:
    """What to raise instead of a refusal of the system that is about a path of the command line; None for any other.

    Args:
      error: raised while the command ran.
      given: the arguments of the command line.
    """
    refused = [os.path.abspath(os.fsdecode(name)) for name in (error.filename, error.filename2) if _is_path(name)]
    for argument in (*READ, *WRITTEN):
        text = given.get(argument)
        lost = error.errno == errno.ENOENT and argument in WRITTEN  # what was being written is gone: a fault
        if not isinstance(text, str) or not text or error.errno not in _OF_A_PATH or lost:
            continue
        own = os.path.abspath(text)
        if any(_within(own, name) or _within(name, own) for name in refused):
            flag = "model" if argument == "base" else argument.replace("_", "-")
            return UsageError(f"{text}: {error.strerror} ({error.filename}); give another --{flag}")
    return None


def _is_path(name: Any) -> bool:
    return isinstance(name, str | bytes | os.PathLike)


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)
