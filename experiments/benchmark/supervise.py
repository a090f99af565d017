"""Jobs in a process of their own, so that one that fails, crashes or hangs costs its own result and no other's.

    supervisor                                worker
    (name, seconds)  ───────────────────────> runs the job
                     <─────────────────────── its results, each sent as soon as it is there
                     <─────────────────────── the end, or the one line that says why it failed

The worker keeps what jobs share (weights, compiled programs) until it dies, is killed for its time, or a job asks for a
fresh one. The supervisor needs no device: all memory of it belongs to the worker.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_SECONDS = 5.0  # no job is begun with less
GRACE_SECONDS = 60.0  # beyond twice its share, before a job is stopped: it may be in the middle of a compilation

RunJob = Callable[[str, float], Iterable[Any]]  # (name, seconds) -> results


@dataclass(frozen=True)
class Job:
    """A name that the worker knows, and what it needs."""

    name: str
    weight: float = 1.0  # its share of the time left, against the weights of the jobs after it
    fresh: bool = False  # in a new process: nothing of earlier jobs is in its memory


@dataclass(frozen=True)
class End:
    """The end of a job: `problem` is "" when it was as it should be; a job that was not `begun` cost nothing."""

    problem: str = ""
    begun: bool = True


def one_line(error: BaseException) -> str:
    """What went wrong, short enough for a cell of a table."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    text = " ".join(f"{type(error).__name__}: {first}".split()).replace("|", "/")
    return text if len(text) <= 200 else f"{text[:197]}..."


def _work(make: Callable[[Any], RunJob], argument: Any, connection: Any) -> None:
    """The worker's life: ends when the supervisor closes its end."""
    run = make(argument)
    while True:
        try:
            name, seconds = connection.recv()
        except EOFError:
            return
        problem = ""
        try:
            for result in run(name, seconds):
                connection.send(result)
        except Exception as error:  # whatever it is, the other jobs go on
            problem = one_line(error)
        connection.send(End(problem))


class _Worker:
    def __init__(self, make: Callable[[Any], RunJob], argument: Any):
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of a started backend
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(make, argument, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.is_used = False

    def run(self, name: str, share: float, most: float) -> Iterator[Any]:
        """The job's results, then its `End`; the worker is stopped after `most` seconds."""
        self.is_used = True
        end = time.monotonic() + most
        try:
            self.connection.send((name, share))
            while self.connection.poll(max(0.0, end - time.monotonic())):
                found = self.connection.recv()
                yield found
                if isinstance(found, End):
                    return
        except (EOFError, OSError):
            self.process.join()
            yield End(f"its process ended with exit code {self.process.exitcode}")
            return
        self.stop()
        yield End(f"stopped after {most:.0f} s")

    def stop(self) -> None:
        """Ends the process and waits until its memory is free."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_jobs(
    jobs: Sequence[Job], make: Callable[[Any], RunJob], argument: Any, seconds: float
) -> Iterator[tuple[str, Any]]:
    """(job's name, result) for each result, and (job's name, `End`) once for each job, in their order.

    Args:
      jobs: run one after another. A job is told its share of the time left, and is stopped after twice that and a
        grace, or when the time of all is over.
      make: called in the worker, with `argument`, when it starts; gives the function that runs a job there. A function
        of a module, as it goes to another process.
      argument: any value that can be pickled.
      seconds: for all jobs together.
    """
    end, worker = time.monotonic() + seconds, None
    try:
        for number, job in enumerate(jobs):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                yield job.name, End("the time was spent before it", begun=False)
                continue
            if worker is not None and (not worker.process.is_alive() or (job.fresh and worker.is_used)):
                worker.stop()
                worker = None
            worker = _Worker(make, argument) if worker is None else worker
            share = left * job.weight / sum(other.weight for other in jobs[number:])
            for found in worker.run(job.name, share, min(left, 2 * share + GRACE_SECONDS)):
                yield job.name, found
    finally:
        if worker is not None:
            worker.stop()
