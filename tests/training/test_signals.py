"""SIGTERM and SIGINT of a command, whatever its main thread is doing, and of a library."""

import os
import re
import signal
import subprocess
import sys

import pytest

from maxtrain.training.signals import StopSignal

COMMAND = """
import hashlib, time
from maxtrain.training import signals

stop = signals.StopSignal(leaves=True).__enter__()
stop.stepping = {stepping}
print("ready", flush=True)
{work}
"""
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # for minutes, in which no handler of Python's is called
UNTIL_ASKED = "while not stop.name: time.sleep(0.001)\nprint(stop.name, flush=True)\ntime.sleep(60)"


def start(work, stepping):
    code = COMMAND.format(work=work, stepping=stepping)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_a_command_leaves_at_once(number):
    process = start(IN_C, False)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert f"stopped by {number.name} before the first step" in errors


@pytest.mark.parametrize("work", [IN_C, UNTIL_ASKED])
def test_the_first_signal_is_remembered_and_the_second_ends_a_command_at_once(work):
    process = start(work, True)
    process.send_signal(signal.SIGTERM)
    if work == UNTIL_ASKED:
        assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    second = "SIGINT" if work == UNTIL_ASKED else "(SIGINT|SIGTERM)"  # of two that wait, the system delivers either first
    assert re.search(f"ended by {second}, a second signal", errors)


def test_in_a_library_the_second_signal_is_not_caught():
    before, interrupted = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)  # a shell ignores it for what it runs behind
    caught = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.name, caught) == ("SIGTERM", [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is interrupted
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_are_obeyed_before_anything_heavy_is_imported():
    code = "import sys, maxtrain.training.signals; sys.exit(bool({'jax', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
