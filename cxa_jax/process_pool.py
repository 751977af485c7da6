"""Long jobs side by side: each in a process of its own, on cores of its own, with a log of its own. Imports no jax.

A job's process ends when this one is gone, however it went: two processes must never write one folder.
"""

import collections
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cxa_jax.console import command_exits

_COMMAND = "from cxa_jax import process_pool; process_pool.serve()"
_POLL_S = 0.5
_GRACE_S = 25.0  # for jobs to save and end when this process is asked to


@dataclasses.dataclass(frozen=True)
class Job:
    """A call to make in another process.

    Attributes:
      name: for messages.
      function: importable by name, not from `__main__`.
      arguments: picklable.
      log: file that takes all the process prints, appended to.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: pathlib.Path


def split_cores(num_parallel: int) -> list[list[int]]:
    """Return disjoint, equal lists of the cores this process may use, one for each of `num_parallel` jobs.

    Where there are fewer cores than jobs, jobs share; where the system pins no process, every list is empty.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(num_parallel)]
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // num_parallel)
    return [[cores[(slot * size + i) % len(cores)] for i in range(size)] for slot in range(num_parallel)]


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[list[int]],
    environment: Mapping[str, str],
    when_done: Callable[[Job, int], None],
    when_waiting: Callable[[], None],
) -> None:
    """Run every job, as many at a time as there are places, and wait for all; a failed one does not stop the others.

    Args:
      jobs: started in order.
      places: for each job that may run at a time, the cores it is pinned to; see `split_cores`.
      environment: variables added to those of this process.
      when_done: called with each job and its exit status, 0 = well.
      when_waiting: called twice a second.
    """
    waiting, running = collections.deque(jobs), {}
    try:
        while waiting or running:
            for place in range(len(places)):
                if waiting and place not in running:
                    job = waiting.popleft()
                    running[place] = job, _start(job, places[place], environment)
            time.sleep(_POLL_S)
            when_waiting()
            for place, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    process.stdin.close()
                    when_done(job, process.returncode)
    finally:  # an interrupt: the jobs are not ours to leave behind
        _end(process for _, process in running.values())


def serve() -> None:
    """Be a job's process: read cores and call from standard input, make the call, exit with its status."""
    cores = pickle.load(sys.stdin.buffer)
    if cores:
        os.sched_setaffinity(0, cores)  # before numpy and jax count the cores
    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with command_exits():  # as in launch.py
        function(*arguments)


def _end(processes: Iterable[subprocess.Popen]) -> None:
    processes = list(processes)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever sent: this returns when the parent's end of the pipe closes
    os._exit(1)


def _start(job: Job, cores: list[int], environment: Mapping[str, str]) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if cores:
        variables |= {"OMP_NUM_THREADS": str(len(cores)), "OPENBLAS_NUM_THREADS": str(len(cores))}
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables | dict(environment),
        )
    try:
        process.stdin.write(pickle.dumps(cores) + pickle.dumps((job.function, job.arguments)))
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at its start: its status and log say why
    return process
