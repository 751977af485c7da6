"""SIGTERM and SIGINT: the first asks, and work ends where nothing is half done; a second one stops at once.

Shared machines send SIGTERM some seconds before they take a job away. Most work may end anywhere, since its files are
whole or not there: `Interrupted` is raised under its feet. Training holds the signal back and asks for it after each
step, which costs one attribute's reading and no wait for the device.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

RESUMABLE = 75  # exit status, EX_TEMPFAIL of sysexits.h: the same command later goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASK_AGAIN_S = 20.0  # a process that is still there then has lost its notice: libraries catch what they do not know
SAME_NOTICE_S = 1.0  # one notice may come twice: to the process group, and passed on by a launcher


class Interrupted(BaseException):
    """A signal asked this process to end; no Exception, so that only the way out catches it."""


class _Notice:
    """What the signal handler, its watcher and the rest of the process share; one for each `end_on_signal`."""

    asked: str | None = None  # the signal's name
    num_holders: int = 0
    swallowed: bool = False  # Interrupted was raised where Python drops exceptions
    num_own: int = 0  # signals that this module sends after that, and that are no second notice
    is_heard: bool = False  # the handlers are in place


_notice = _Notice()
_sending = threading.Lock()


def is_asked() -> bool:
    """Say whether a signal has asked the process to end."""
    return _notice.asked is not None


def check() -> None:
    """Raise Interrupted if a signal has asked the process to end: for loops in which nothing is lost."""
    if _notice.asked:
        _notice.swallowed = False
        raise Interrupted(_notice.asked)


@contextlib.contextmanager
def held_back(*, check_at_end: bool = True) -> Iterator[None]:
    """Raise nothing by itself inside; the body asks by `is_asked` or `check`. At the outermost one's end, `check`.

    In other threads than the main one nothing is ever raised, and this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    notice = _notice
    notice.num_holders += 1
    try:
        yield
    finally:
        notice.num_holders -= 1
    if check_at_end and not notice.num_holders:
        check()


@contextlib.contextmanager
def end_on_signal() -> Iterator[None]:
    """Make the first SIGTERM or SIGINT raise Interrupted in the main thread, and a later one end the process.

    The process ends with status 128 + the signal's number then, even while the main thread is inside a library. Signals
    within a second of the first are the same notice. A signal that is ignored, as under nohup, stays so.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    global _notice
    _notice = notice = _Notice()
    former_hook, sys.unraisablehook = sys.unraisablehook, _ask_again
    former_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    former = {
        number: signal.signal(number, _handle) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    notice.is_heard = True
    threading.Thread(target=_watch, args=(reader, notice), daemon=True).start()
    try:
        yield
    except Exception as error:
        if _is_behind(error):
            raise Interrupted(_notice.asked) from error
        raise
    finally:
        _notice.num_holders += 1  # nothing is raised in here
        with _sending:
            _notice.is_heard = False
        sys.unraisablehook = former_hook
        signal.set_wakeup_fd(former_fd)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
        _notice.asked = None


def _is_behind(error: BaseException | None) -> bool:
    """Tell whether Interrupted is what another error rests on: modules in C make an ImportError of it, for one."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _ask_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise Interrupted once more where it was dropped, as in a callback of the garbage collector."""
    if not isinstance(unraisable.exc_value, Interrupted):
        _tell_unraisable(unraisable)
        return
    with held_back(check_at_end=False):  # what is raised in here would be dropped too
        _send_again(_notice)


def _send_again(notice: _Notice) -> None:
    """Send the signal that was asked by to the main thread, until it raises."""
    number, notice.swallowed = signal.Signals[notice.asked], True

    def send() -> None:
        while True:
            time.sleep(0.05)  # a callback that dropped it is over then, or at the next turn
            with _sending:
                if not (notice.is_heard and notice.swallowed):
                    return
                if not notice.num_holders:
                    notice.num_own += 1
                    signal.pthread_kill(threading.main_thread().ident, number)  # a real one, which ends a sleep too

    threading.Thread(target=send, daemon=True).start()


def _tell_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Drop what tensorstore calls back into a loop that orbax has closed, as after a failed save; tell the rest."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _handle(number: int, _: object) -> None:
    if _notice.asked and not _notice.swallowed:
        return  # what the first one started must not be cut by its echo
    _notice.asked = signal.Signals(number).name
    if not _notice.num_holders:
        check()


def _watch(reader: int, notice: _Notice) -> None:
    """Tell of the first signal at once, end the process at a later one; Python's own handlers wait for the library.

    Raise Interrupted once more from time to time, unless it is held back: a library may have dropped it, as an event
    loop does with what its callbacks raise.
    """
    first = None
    with os.fdopen(reader, "rb", buffering=0) as numbers:
        while True:
            if not select.select([numbers], [], [], ASK_AGAIN_S if first else None)[0]:
                # If it did not ask yet, the main thread is inside a library; if it is swallowed, it is being sent.
                if notice.asked and not notice.num_holders and not notice.swallowed:
                    _send_again(notice)
                continue
            byte = numbers.read(1)
            if not byte:
                return
            if byte[0] not in SIGNALS:
                continue
            if notice.num_own:
                notice.num_own -= 1
                continue
            if first is None:
                first = time.monotonic()
                name = signal.Signals(byte[0]).name
                log.warning("%s: ending where nothing is lost; a second signal stops at once", name)
            elif time.monotonic() - first > SAME_NOTICE_S:
                os._exit(128 + byte[0])
