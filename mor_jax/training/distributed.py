"""Several processes as one run: joining them, deciding once for all, agreeing when to stop, and leaving.

jax finds the other processes itself on TPU pods, under Slurm and under Open MPI before 5; elsewhere they are named.
Everything here is a no-op for a process that is alone.

    join            before anything touches a device
    first_decides   what depends on the disk is looked up by process 0, so that all take the same way
    Pulse           a small reduction beside each step; its result is fetched with the step's metrics, so that all
                    processes see a signal that came to one of them at the same step, and none waits for it
    leave           a process that fails must not wait at the exit for peers that are busy, or gone

jax's own preemption service is switched off: its handler would take SIGTERM away from `signals.StopRequest`, which also
knows Ctrl-C and what a second signal means.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mor_jax.processes import from_first, is_alone, is_first
from mor_jax.training.mesh import replicated

JOIN_SECONDS = 300  # that the first process waits for the last one
HEARTBEAT_SECONDS = 30  # of silence until a peer counts as lost
EXIT_SECONDS = 20  # that a process waits at its end for the others to come to theirs
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "heartbeat", "Gloo", "NCCL")  # in the text of jax's errors
_NO_CLUSTER, _IN_USE = "coordinator_address should be defined", "must be called before any JAX calls"  # jax's words


class DistributedError(ValueError):
    """The processes of a run cannot be joined as they were started."""

    exit_code = 2


class LostPeerError(RuntimeError):
    """Another process of the run is gone, so that no step can be finished any more."""

    exit_code = 3

    def __init__(self, error: BaseException | None = None) -> None:
        detail = "" if error is None else f" ({' '.join(str(error).split())[:200]})"
        super().__init__(
            f"process {jax.process_index()} of {jax.process_count()}: another process was lost{detail}: its own log"
            " says why; start all of them again (mor train with --resume)"
        )


class DecidedElsewhereError(RuntimeError):
    """Process 0 failed, and has said why; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def join(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Joins the other processes of this run; to be called before jax touches a device.

    What is given counts, else what jax detects; without either, or with devices in use, the process stays alone. One
    that has joined stays joined.

    Args:
      coordinator: HOST:PORT of process 0; empty takes JAX_COORDINATOR_ADDRESS.
      num_processes: of the run; None takes JAX_NUM_PROCESSES.
      process_id: of this one, from 0; None takes JAX_PROCESS_ID.

    Returns:
      Whether there are other processes.

    Raises:
      DistributedError: only a part of the three is given, they contradict each other, or jax does not find the
        processes that a launcher started together.
    """
    if jax.distributed.is_initialized():
        return not is_alone()
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = _number("JAX_NUM_PROCESSES", num_processes)
    process_id = _number("JAX_PROCESS_ID", process_id)
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "initialization_timeout": JOIN_SECONDS,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": EXIT_SECONDS,
    }
    launched = _launched()
    named = bool(coordinator) or num_processes is not None or process_id is not None
    if named:
        options |= _explicit(coordinator, num_processes, process_id)
    elif launched == 1:  # jax would open a port of the job's number: two such processes on a host end each other
        return False
    minutes = JOIN_SECONDS // 60
    undo = _on_abort(LostPeerError.exit_code, f"the other processes did not come within {minutes} minutes: start all")
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        alone = _IN_USE in str(error) or (_NO_CLUSTER in str(error) and launched is None)
        if named or not alone:
            raise DistributedError(f"not joined ({error}): name the processes, or use --distributed off") from error
    if not jax.distributed.is_initialized() or is_alone():
        undo()
        return False
    _on_abort(LostPeerError.exit_code, str(LostPeerError()))
    if not is_first():
        logging.getLogger("mor_jax").setLevel(logging.ERROR)
    return True


def _launched() -> int | None:
    """How many processes the launcher started together; None without one that says so.

    Open MPI comes first, as jax has it: its launcher may itself run under Slurm's.
    """
    slurm = os.environ.get("SLURM_NTASKS") if "SLURM_STEP_NODELIST" in os.environ else None  # of srun, not sbatch
    count = os.environ.get("OMPI_COMM_WORLD_SIZE", slurm)
    return None if count is None else int(count)


def _number(name: str, given: int | None) -> int | None:
    text = os.environ.get(name)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise DistributedError(f"{name}={text!r}: give a whole number")
    return int(text)


def _explicit(coordinator: str, num_processes: int | None, process_id: int | None) -> dict[str, Any]:
    given = {"--coordinator": coordinator or None, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DistributedError(f"{', '.join(missing)} missing: give all of {', '.join(given)}, or none on a cluster")
    assert num_processes is not None
    assert process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise DistributedError(f"--coordinator {coordinator}: give HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise DistributedError(f"--process-id {process_id}: must lie in 0..{num_processes - 1} (--num-processes)")
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def first_decides(function: Callable[[], Any]) -> Any:
    """What `function`, run by process 0 alone, returns; JSON's types only. All processes must call this.

    Raises:
      DecidedElsewhereError: on the other processes, when it raised on process 0.
    """
    if is_alone():
        return function()
    if not is_first():
        outcome = json.loads(_broadcast(b""))
        if "error" in outcome:
            raise DecidedElsewhereError(outcome["error"], outcome["exit_code"])
        return outcome["value"]
    try:
        value = function()
    except Exception as error:
        outcome = {"error": str(error), "exit_code": getattr(error, "exit_code", 3)}
        _broadcast(json.dumps(outcome).encode())
        raise
    return json.loads(_broadcast(json.dumps({"value": value}).encode()))["value"]


def _broadcast(text: bytes) -> bytes:
    """Process 0's bytes, on all."""
    size = int(from_first(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(text, np.uint8)
    return np.asarray(from_first(padded)).tobytes()


def check_same_everywhere(described: Mapping[str, Any]) -> None:
    """Returns when all processes describe the run alike.

    Args:
      described: name -> value of JSON's types.

    Raises:
      DistributedError: on the processes that differ from process 0; names what does.
    """
    own = json.loads(json.dumps(described))
    wanted = first_decides(lambda: own)
    for name in sorted(own.keys() | wanted.keys()):
        if own.get(name) != wanted.get(name):
            raise DistributedError(
                f"process {jax.process_index()}: {name}={own.get(name)!r} and process 0 has {wanted.get(name)!r}: start"
                " all processes with the same flags, files and versions"
            )


def check_same_content(name: str, parts: Iterable[Any]) -> None:
    """Returns when all processes have the same bytes, by their hash; a process that is alone reads none of them.

    Args:
      name: what they are, for the message.
      parts: bytes or contiguous arrays, in order.

    Raises:
      DistributedError: on the processes that differ from process 0.
    """
    if is_alone():
        return
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    check_same_everywhere({name: found.hexdigest()})


class Pulse:
    """What all processes tell each other beside a step, reduced on the devices."""

    def __init__(self, mesh: Mesh):
        place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._signals = lambda number: jax.make_array_from_callback(
            (mesh.size,), place, lambda _: np.full(1, number, np.int32)
        )

        def reduce(signals: jax.Array, segment_ids: jax.Array | None) -> dict[str, jax.Array]:
            told = {"signal": jnp.max(signals)}
            return told if segment_ids is None else told | {"real_tokens": jnp.sum(segment_ids > 0, dtype=jnp.int32)}

        self._reduce = jax.jit(reduce, out_shardings=replicated(mesh))

    def __call__(self, number: int | None, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """{"signal": the largest signal number of all processes, 0 for none; "real_tokens" of the whole batch}."""
        return self._reduce(self._signals(number or 0), batch.get("segment_ids"))


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of jax means that another process is gone."""
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and not is_alone() and any(word in text for word in _LOST)


_ON_ABORT: list[Any] = []  # what the C library was told to call must not be collected


def _on_abort(code: int, line: str) -> Callable[[], None]:
    """From now on an abort ends the process with `code` and `line`; returns what undoes that.

    XLA aborts a process whose peers did not come or went silent, often from a thread of its own, in which Python runs
    no handler.
    """
    text = f"mor: {line}\n".encode() if line else b""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        os.write(2, text)
        os._exit(code)

    set_handler = ctypes.CDLL(None).signal
    set_handler.restype = ctypes.c_void_p
    _ON_ABORT.append(handler)
    before = set_handler(int(signal.SIGABRT), handler)
    return lambda: set_handler(int(signal.SIGABRT), ctypes.c_void_p(before))


def leave(code: int, wait: bool) -> None:
    """Ends this process with `code`, when it is one of several and the code says that something failed.

    Args:
      code: of the exit.
      wait: whether the others may come to their end too: they are given `EXIT_SECONDS`.
    """
    if code == 0 or not jax.distributed.is_initialized() or is_alone():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if wait:
        _on_abort(code, "")
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what several processes do: an error of jax that means a lost peer says so.

    What libraries in C++ print on the process's stdout goes to stderr: the collectives on CPUs greet each other there.

    Raises:
      LostPeerError: another process is gone.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_lost_peer(error):
            raise LostPeerError(error) from error
        raise
    finally:
        os.dup2(kept, 1)
        os.close(kept)
