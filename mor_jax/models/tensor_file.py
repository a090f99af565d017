"""Safetensors files with the permissions of any other file.

The library writes to a private temporary file and renames it, so that its files can be read by their owner alone:
colleagues, and a server that runs as another user, could read every file of an export but the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


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
