"""Two real processes with four virtual devices each, joined as on two hosts."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "mor_jax.cli.main")


def free_port(first=0, last=0):
    """A free port of this host from `first` to `last`; any without them."""
    for port in random.sample(range(first, last + 1), last + 1 - first):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise AssertionError(f"no free port from {first} to {last}")


def without_launchers(environment):
    """The variables but for those by which jax finds other processes."""
    launchers = ("JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "SLURM", "OMPI", "KUBE", "TPU", "MEGASCALE")
    return {name: value for name, value in environment.items() if not name.startswith(launchers)}


class Pair:
    """Both processes of `python WORDS`, each told the coordinator and its number; their output goes to files.

    `{number}` in a word is the number. With `launched` they are told nothing: these are the variables that a launcher
    gives each.
    """

    def __init__(self, folder, *words, launched=None):
        folder.mkdir(exist_ok=True)
        self._files = [[folder / f"{name}{number}" for name in ("out", "err")] for number in range(2)]
        if launched is None:
            coordinator = f"127.0.0.1:{free_port()}"
            words += ("--coordinator", coordinator, "--num-processes", "2", "--process-id", "{number}")
        self.processes = [self._start(number, words, launched[number] if launched else {}) for number in range(2)]

    def _start(self, number, words, launched):
        own = {
            **without_launchers(os.environ),
            **launched,
            "PYTHONPATH": str(ROOT),
            "USE_TORCH": "0",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        }
        command = [sys.executable, *(str(word).replace("{number}", str(number)) for word in words)]
        out, err = self._files[number]
        with open(out, "w") as stdout, open(err, "w") as stderr:
            return subprocess.Popen(command, cwd=ROOT, env=own, stdout=stdout, stderr=stderr)

    def output(self, number):
        """What a process printed on stdout."""
        return self._files[number][0].read_text()

    def errors(self, number):
        """What a process printed on stderr."""
        return self._files[number][1].read_text()

    def messages(self, number):
        """The lines of a process on stderr that begin as ours do."""
        text = self.errors(number).replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith("mor: ")]

    def wait(self, seconds=600):
        """The exit codes of both, which end within `seconds` or fail the test."""
        limit = time.monotonic() + seconds
        try:
            return [process.wait(timeout=limit - time.monotonic()) for process in self.processes]
        finally:
            self.end()

    def wait_until(self, condition, seconds=600):
        """Returns when `condition()` holds; fails when a process ends or the time is up."""
        limit = time.monotonic() + seconds
        while not condition():
            ended = [number for number, process in enumerate(self.processes) if process.poll() is not None]
            if ended or time.monotonic() > limit:
                self.end()
                raise AssertionError(self._files[(ended or [0])[0]][1].read_text()[-3000:])
            time.sleep(0.01)

    def end(self):
        """Kills what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
