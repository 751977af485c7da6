"""An ordered map over worker processes that see nothing of this one: no fork, no `__main__`, no jax.

`multiprocessing` would fork a process that holds threads and perhaps an accelerator, or import the caller's main
module (and with it jax) anew in every worker. These workers are plain interpreters that read tasks from their standard
input, so they also end by themselves when this process is gone, however it went.
"""

import collections
import contextlib
import fcntl
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

_COMMAND = "from cxa_jax.data import parallel; parallel.serve()"
_TASKS_AHEAD = 2  # of each worker: the one it computes, and the next
_PIPE_BYTES = 1 << 20  # what Linux lets anyone ask for


def count_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Any], Any], tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield function(task) for every task, in order, a bounded number ahead of the reader.

    Args:
        function: importable by name, not from `__main__`; its module decides what the workers load.
        tasks: small (below 16 KiB) and picklable.
        num_workers: processes; 1 stays in this one, 0 takes one for each core. The results do not depend on it.

    Yields:
        The results; at most two for each worker wait in memory.

    Raises:
        Exception: whatever `function` raised, in its task's turn.
        RuntimeError: if a worker died.
    """
    num_workers = num_workers or count_cores()
    if num_workers == 1:
        yield from map(function, tasks)
        return
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_start_worker()) for _ in range(num_workers)]
        for worker in workers:
            _send(worker, function)
        waiting = collections.deque()  # one entry for each task in flight: the worker that has it
        for worker, task in zip(itertools.cycle(workers), tasks):  # noqa: B905 (the cycle never ends)
            if len(waiting) == _TASKS_AHEAD * num_workers:
                yield _receive(waiting.popleft())
            _send(worker, task)
            waiting.append(worker)
        while waiting:
            yield _receive(waiting.popleft())


def serve() -> None:
    """Be a worker: read a function and its tasks from standard input, write the outcomes to standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle; its end closes our input
        signal.signal(number, signal.SIG_IGN)
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not get between the outcomes
    try:
        function = pickle.load(sys.stdin.buffer)
        while True:
            task = pickle.load(sys.stdin.buffer)
            pickle.dump(_try(function, task), outcomes, pickle.HIGHEST_PROTOCOL)
            outcomes.flush()
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent has ended, or was killed
        os._exit(0)


def _try(function: Callable[[Any], Any], task: Any) -> tuple[Any, Exception | None]:
    try:
        return function(task), None
    except Exception as error:  # not ours to judge: it is raised again in the parent
        return None, error


@contextlib.contextmanager
def _start_worker() -> Iterator[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", _COMMAND]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as worker:
        _widen(worker.stdout)
        try:
            yield worker
        finally:
            worker.kill()


def _widen(pipe: IO[bytes]) -> None:
    """Let a pipe hold a few outcomes, so that a worker goes on while the parent reads another's; 64 KiB hold none."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux; this user has too many such pipes
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _send(worker: subprocess.Popen, message: Any) -> None:
    try:
        pickle.dump(message, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise _death(worker) from error


def _receive(worker: subprocess.Popen) -> Any:
    try:
        result, error = pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError) as end:
        raise _death(worker) from end
    if error is not None:
        raise error
    return result


def _death(worker: subprocess.Popen) -> RuntimeError:
    return RuntimeError(f"a worker process ended with status {worker.wait()}; its own message, if any, stands above")
