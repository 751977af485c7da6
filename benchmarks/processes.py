"""The programs of a comparison, begun, stopped and ended, each with all that it has started; on Linux, which tells."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Processes:
    """Programs that run. While `only` lets some of them work, no other one is begun, works, or is ended."""

    def __init__(self):
        self._lock, self._running, self._over = threading.Lock(), set(), False

    def begin(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start a program.

        Raises:
          RuntimeError: `end_all` was called.
        """
        with self._lock:
            if self._over:
                raise RuntimeError("no more programs are begun")
            process = subprocess.Popen(command, **options)
            self._running.add(process.pid)
            return process

    def end(self, process: subprocess.Popen) -> None:
        """Kill a program with all that it has started; it may have ended."""
        with self._lock:
            self._running.discard(process.pid)
            if process.poll() is None:
                kill_family(process.pid)
        process.wait()

    def end_all(self) -> None:
        """Kill all programs, and let none begin from now on."""
        with self._lock:
            self._over = True
            for root in self._running:
                kill_family(root)

    @contextlib.contextmanager
    def only(self, pids: set[int]) -> Iterator[None]:
        """Stop all programs but these; then let them go on."""
        stopped: list[int] = []
        with self._lock:
            try:
                for root in self._running - pids:
                    while more := find_family(root) - set(stopped):  # it may just have begun another
                        for pid in more:
                            stopped.append(pid)
                            send(pid, signal.SIGSTOP)
                yield
            finally:
                for pid in stopped:
                    send(pid, signal.SIGCONT)


def end_by_sigterm() -> None:
    """Let SIGTERM end this process as an error does, so that the programs it has begun are ended, not left stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))


def find_family(root: int) -> set[int]:
    """Return the process, its children, theirs, and so on."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family, more = set(), {root}
    while more:
        family |= more
        more = {pid for pid, parent in parents.items() if parent in more} - family
    return family


def kill_family(root: int) -> None:
    """Kill the process and all that it has started."""
    for pid in find_family(root):
        send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
