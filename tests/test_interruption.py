"""Signals: the first raises or waits to be asked for, its echo does nothing, a later one ends the process at once."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cxa_jax import interruption
from cxa_jax.interruption import Interrupted, check, end_on_signal, held_back, is_asked

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_where_nothing_holds_it_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name), end_on_signal():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before and not is_asked()


def test_a_held_back_signal_waits_to_be_asked_for_and_comes_at_the_end():
    done = []
    with pytest.raises(Interrupted), end_on_signal(), held_back():
        check()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(is_asked())
        with pytest.raises(Interrupted):
            check()
        done.append("body")
    assert done == [True, "body"]


def test_the_echo_of_a_signal_does_not_cut_what_the_first_one_started():
    cleaned = []
    with pytest.raises(Interrupted), end_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)
    assert cleaned


def test_no_exception_handler_swallows_it():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("how", ["cause", "context"])
def test_an_error_that_a_library_made_of_it_is_taken_for_what_it_is(how):
    with pytest.raises(Interrupted, match="SIGTERM"), end_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Interrupted as notice:
            raise ImportError("initialization failed") from (notice if how == "cause" else None)


def test_a_notice_that_python_drops_is_raised_again():
    """In a callback of the garbage collector every exception is ignored: JAX has one."""

    passed, sent, start = [], [], time.monotonic()

    def stop(*_):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    try:
        with pytest.raises(Interrupted, match="SIGTERM"), end_on_signal():
            gc.callbacks.append(stop)
            gc.collect()
            passed.append(True)
            time.sleep(20)
    finally:
        gc.callbacks.remove(stop)
    assert passed and time.monotonic() - start < 10


def test_a_notice_that_a_library_drops_is_raised_again(monkeypatch):
    monkeypatch.setattr(interruption, "ASK_AGAIN_S", 0.3)
    passed, start = [], time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM"), end_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            passed.append(True)
        with held_back(check_at_end=False):
            time.sleep(1)
            passed.append("not while it is held back")
        time.sleep(20)
    assert len(passed) == 2 and time.monotonic() - start < 10


def test_another_error_that_python_drops_is_told(capsys):
    class Bad:
        def __del__(self):
            raise ValueError("in a destructor")

    with end_on_signal():
        Bad()
        gc.collect()
    assert "in a destructor" in capsys.readouterr().err


def test_an_error_of_its_own_stays_one():
    with pytest.raises(ImportError), end_on_signal():
        raise ImportError("no such module") from ValueError("unlike a signal")


PROGRAM = """
import time
from cxa_jax import console
console.log_to_console()
with console.command_exits():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        {cleaning}
"""


@pytest.fixture
def start():
    """Return a function that starts the program; whatever is still there at the end is killed."""
    processes = []
    yield lambda cleaning="pass": processes.append(_start(cleaning)) or processes[-1]
    for process in processes:
        process.kill()
        process.communicate()


def _start(cleaning):
    command = [sys.executable, "-c", PROGRAM.format(cleaning=cleaning)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_stopped_command_exits_resumable_and_says_so(start):
    process = start()
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == interruption.RESUMABLE == os.EX_TEMPFAIL
    assert "stopped by SIGTERM; the same command goes on" in messages and "Traceback" not in messages


def test_a_second_signal_stops_at_once_even_inside_a_library(start):
    cleaning = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C: Python's handlers wait
    process = start(cleaning)
    process.send_signal(signal.SIGINT)
    time.sleep(interruption.SAME_NOTICE_S + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with end_on_signal():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert not is_asked()
    finally:
        signal.signal(signal.SIGINT, former)
