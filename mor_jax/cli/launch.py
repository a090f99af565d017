"""Running a command as one of several processes.

jax is not imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mor_jax.cli.options import LaunchOptions


def on_all(launch: LaunchOptions, run: Callable[[], Any], described: Mapping[str, Any] | None = None) -> Any:
    """What `run` returns on process 0, or on the only one; None on the others.

    Args:
      launch: how the others are found.
      run: the command.
      described: what must be alike on all of them beside the versions, name -> value of JSON's types; None for a
        command that finds out by itself.

    Raises:
      DistributedError, LostPeerError: the other processes cannot be joined, were told otherwise, or are gone.
    """
    if not _joined(launch):
        return run()
    from mor_jax.processes import is_first
    from mor_jax.training.distributed import check_same_everywhere, together
    from mor_jax.training.run_folder import environment

    with together():
        if described is not None:
            check_same_everywhere({"versions": environment()["versions"], **described})
        result = run()
        return result if is_first() else None


def is_peer() -> bool:
    """Whether another process than this one talks."""
    if "mor_jax.processes" not in sys.modules:
        return False
    from mor_jax.processes import is_first

    return not is_first()


def _joined(launch: LaunchOptions) -> bool:
    """Whether this is one of several processes; on its own unless a flag says otherwise."""
    named = launch.coordinator or launch.num_processes is not None or launch.process_id is not None
    mode = launch.distributed or ("auto" if named else "off")
    if mode == "off":
        return False
    from mor_jax.training.distributed import join

    return join(launch.coordinator, launch.num_processes, launch.process_id)


def leave(code: int, failure: BaseException | None) -> None:
    """Ends a process that failed as one of several; returns in all others."""
    if code and "mor_jax.training.distributed" in sys.modules:
        from mor_jax.training import distributed

        with contextlib.suppress(BrokenPipeError):
            distributed.leave(code, wait=not isinstance(failure, distributed.LostPeerError))
