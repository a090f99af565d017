import signal
import subprocess
import sys

import pytest

CODE = """
import signal, time
from mor_jax.training.signals import StopRequest
with StopRequest() as stop:
    {before}
    print("ready", flush=True)
    while stop.signal is None:
        time.sleep(0.01)
    print("saving", flush=True)
    {saving}
    stop.raise_if_requested()
"""
# The main thread is held in C, as by a compilation, so that no Python handler can run there.
IN_C = "import ctypes, ctypes.util; ctypes.CDLL(ctypes.util.find_library('c')).poll(None, 0, 60_000)"


def _start(before="stop.wait_for_step()", saving="pass"):
    code = CODE.format(before=before, saving=saving)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("before", ["stop.wait_for_step()", "pass"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_step_if_there_is_one(number, before):
    process = _start(before)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert output == ("saving\n" if before != "pass" else "")
    if number == signal.SIGTERM:
        assert process.returncode == 143
    else:
        assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("saving", ["time.sleep(60)", "while True: time.sleep(0.1)"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(number, saving):
    process = _start(saving=saving)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "second signal" in errors


def test_two_signals_end_even_a_main_thread_that_is_held_in_c():
    process = _start(before=f"stop.wait_for_step(); print('ready', flush=True); {IN_C}; {IN_C}; {IN_C}")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
