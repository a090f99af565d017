"""SIGTERM and Ctrl-C as a wish to stop: the loop saves at the step it is in, a second signal ends the process at once.

Python runs a signal handler only when the main thread is back in the interpreter, which a compilation keeps it from for
minutes. A thread that reads the wake-up descriptor sees the second signal all the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context in which the first SIGTERM or Ctrl-C is noted, and the second exits with 128 + its number.

    Before `wait_for_step` the first signal stops at once, since there is nothing to save. Outside the main thread,
    where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferred = False
        self._previous: dict[int, object] = {}
        self._read = self._write = self._previous_wakeup = -1

    def __enter__(self) -> StopRequest:
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=_exit_at_second, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Puts the handlers back that were there before."""
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal itself returned
        os.close(self._write)  # ends the thread, which closes the other end

    def wait_for_step(self) -> None:
        """From now on a signal waits until the loop asks for `signal` and has saved."""
        self._deferred = True

    def raise_if_requested(self) -> None:
        """Raises what the signal means, when one came.

        Raises:
          KeyboardInterrupt: Ctrl-C.
          SystemExit: SIGTERM; its code is 143, because 0 would tell a scheduler that the job is done.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self._deferred:
            self.raise_if_requested()


def _exit_at_second(read: int) -> None:
    seen = 0
    while data := os.read(read, 64):
        seen += sum(number in SIGNALS for number in data)
        if seen > 1:
            print("mor: second signal: stopped without saving", file=sys.stderr, flush=True)
            os._exit(128 + data[-1])
    os.close(read)
