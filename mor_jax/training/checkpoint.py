"""Checkpoints that are either whole and verified or not there.

    checkpoints/120/{adapters,adapter_state,opt_state,…}   orbax, written in the background
    checkpoints/120/metadata                               iterator state, base fingerprint, versions
    checkpoints/120/manifest.json                          checksums of all of it, last: the commit
    checkpoints/bad/80                                     set aside: no manifest, or a file that fails its check

A step without a manifest was never committed. The base model is not in here, only its fingerprint. Of several
processes all write their shards; the first alone commits, verifies and moves, on a disk that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.processes import is_first
from mor_jax.training.distributed import first_decides
from mor_jax.training.integrity import MANIFEST, IntegrityError, verify_manifest, write_manifest

_LOGGER = logging.getLogger(__name__)
_METADATA = "metadata"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, or is not one of this run."""

    exit_code = 3


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      directory: made when the first checkpoint is saved.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._pending: int | None = None
        self._orbax: Any = None

    def steps(self) -> list[int]:
        """Committed steps, oldest first; their files are not verified here."""
        return [step for step in self._present() if (self.directory / str(step) / MANIFEST).exists()]

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, metadata) of the newest checkpoint that passes its check, or None; moves nothing, reads no array."""
        return first_decides(self._newest)

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        for step in reversed(self.steps()):
            target = self.directory / str(step)
            if not verify_manifest(target):
                return step, json.loads((target / _METADATA / _METADATA).read_text(encoding="utf-8"))
        return None

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Starts saving; `commit` finishes. The arrays may be donated as soon as this returns.

        Args:
          step: names the folder; a committed step is not written again.
          items: name -> pytree of arrays; an item without leaves is left out.
          metadata: anything that JSON can hold.

        Raises:
          CheckpointError: the step exists already.
        """
        import orbax.checkpoint as ocp

        self.commit()
        target = self.directory / str(step)
        if target.exists():
            raise CheckpointError(f"{target} exists: resume the run, or choose another output_dir")
        self.directory.mkdir(parents=True, exist_ok=True)
        filled = {name: item for name, item in items.items() if jax.tree.leaves(item)}
        parts = {name: ocp.args.StandardSave(item) for name, item in filled.items()}
        self._checkpointer().save(target, ocp.args.Composite(**parts, metadata=ocp.args.JsonSave(dict(metadata))))
        self._pending = step

    def poll(self) -> None:
        """Commits the checkpoint under way when its files are all there, and returns at once otherwise."""
        if self._pending is not None and (self.directory / str(self._pending)).exists():
            self.commit()

    def commit(self) -> None:
        """Waits for the checkpoint under way, writes its manifest, then removes the oldest ones.

        Raises:
          CheckpointError: it was not written.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        self._checkpointer().wait_until_finished()
        target = self.directory / str(step)
        if not target.is_dir():
            raise CheckpointError(f"{target} was not written: check the disk")
        if is_first():
            write_manifest(target)
            for old in self.steps()[: -self.keep]:
                (self.directory / str(old) / MANIFEST).unlink()  # first: half of a checkpoint is none
                shutil.rmtree(self.directory / str(old))

    def restore(
        self, items: Mapping[str, Any], verified: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that passes its check; worse ones on the way are moved to `bad/`.

        Args:
          items: name -> pytree of arrays or `ShapeDtypeStruct`s whose shapes, dtypes and shardings are restored into.
          verified: the step that `newest` has just found, which is not verified again.

        Returns:
          (step, items, metadata), or None when nothing was ever committed.

        Raises:
          IntegrityError: checkpoints were committed and none is good any more.
          CheckpointError: its arrays are not those of `items`: other settings, or another version, wrote it.
        """
        import orbax.checkpoint as ocp

        step = first_decides(lambda: self._newest_good(verified))
        if step is None:
            return None
        filled = {name: _abstract(item) for name, item in items.items() if jax.tree.leaves(item)}
        parts = {name: ocp.args.StandardRestore(item) for name, item in filled.items()}
        wanted = ocp.args.Composite(**parts, metadata=ocp.args.JsonRestore())
        try:
            found = self._checkpointer().restore(self.directory / str(step), wanted)
        except ValueError as error:  # orbax's own lists every array
            place = " ".join(str(error).split(" - Source")[0].split())[:300]
            raise CheckpointError(
                f"{self.directory / str(step)} does not hold the arrays of this run ({place}): resume with the "
                "settings and the mor_jax that wrote it, or start anew in another output_dir"
            ) from error
        restored = {name: found[name] if name in filled else item for name, item in items.items()}
        return step, restored, dict(found[_METADATA])

    def _newest_good(self, verified: int | None) -> int | None:
        """The newest step that passes its check, or None when nothing was committed; moves away what is worse."""
        last: IntegrityError | None = None
        for step in reversed(self._set_aside_unfinished()):
            target = self.directory / str(step)
            bad = [] if step == verified else verify_manifest(target)
            if not bad:
                return step
            last = IntegrityError(self._set_aside(target), bad)
            _LOGGER.warning("%s", last)
        if last is not None:
            raise last
        return None

    def close(self) -> None:
        """Commits what is under way and stops the background thread."""
        self.commit()
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def abandon(self) -> None:
        """Forgets the checkpoint under way, which the processes of a run cannot finish without one another."""
        self._pending = self._orbax = None

    def _checkpointer(self) -> Any:
        import orbax.checkpoint as ocp

        if self._orbax is None:
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._orbax

    def _present(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.is_dir() and path.name.isdecimal())

    def _set_aside_unfinished(self) -> list[int]:
        """Moves away what a killed process left behind; returns the committed steps, oldest first."""
        committed = self.steps()
        if self.directory.is_dir():
            for path in sorted(self.directory.iterdir()):
                if path.is_dir() and path.name != "bad" and path.name not in map(str, committed):
                    self._set_aside(path)
        return committed

    def _set_aside(self, path: Path) -> Path:
        place = self.directory / "bad" / path.name
        number = 1
        while place.exists():
            number += 1
            place = self.directory / "bad" / f"{path.name}-{number}"
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
        return place


def _abstract(item: Any) -> Any:
    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

    return jax.tree.map(abstract, item)


def fingerprint(params: Any) -> str:
    """SHA-256 over the paths, shapes, dtypes and contents of a pytree of arrays; any flipped bit changes it.

    Contents enter through two sums modulo 2^32 of their bits, one of them weighted by position, which are taken on the
    devices that hold the arrays and do not depend on the mesh.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree.leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
        sums = np.asarray(_bit_sums(leaf)).tolist()
        digest.update(f"{jax.tree_util.keystr(path)}{tuple(leaf.shape)}{leaf.dtype}{sums}\n".encode())
    return digest.hexdigest()


@jax.jit
def _bit_sums(leaf: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    weight = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = weight * jnp.uint32(size) + index
    odd = weight * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * odd, dtype=jnp.uint32)])
