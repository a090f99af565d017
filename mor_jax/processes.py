"""What the processes of one run do together; all of it is a no-op for a process that is alone.

Each function but `is_first` and `is_alone` must be called by all processes, in the same order.
"""

from __future__ import annotations

from typing import Any

import jax


def is_first() -> bool:
    """Whether this process writes files and talks: process 0, or the only one."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


def barrier(name: str) -> None:
    """Returns when all processes have come here; `name` must be the same on all."""
    if not is_alone():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def gathered(tree: Any) -> Any:
    """The arrays of a pytree whole on each host, one after the other; themselves where they are already."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def from_first(tree: Any) -> Any:
    """Process 0's arrays on all; the others give arrays of the same shapes and dtypes."""
    if is_alone():
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return broadcast_one_to_all(tree)
