"""Safetensors files with the permissions of any other file, and folders that are there whole or not at all.

The library writes to a private temporary file and renames it, so that its files can be read by their owner alone:
colleagues, and a server that runs as another user, could read every file of an export but the weights.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mor_jax.processes import barrier, is_first


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the arrays to `path`, whole or not at all, with the permissions that `open` gives a file there.

    Args:
      tensors: contiguous arrays by name.
      path: of the file; an older one is replaced and its permissions stay.
      metadata: text for the file's header.

    Raises:
      OSError: the file cannot be written.
    """
    path.open("ab").close()  # the umask can only be read by setting it, for all threads at once
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path | None]:
    """A folder beside `target` to write into, which takes its name at the end.

    Of several processes, all of which must come here, the first looks and writes; the others get None, and leave when
    it is done.

    Raises:
      FileExistsError: `target` is there and not empty.
    """
    if not is_first():
        yield None
    else:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is not empty: choose another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            yield folder
            os.replace(folder, target)
    barrier(f"{target.name} is there")
