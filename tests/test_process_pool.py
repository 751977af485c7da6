"""Jobs in processes of their own: pinned, logged, failing alone, and gone with their parent."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cxa_jax.errors import UserError
from cxa_jax.process_pool import Job, run_jobs, split_cores

ROOT = pathlib.Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pins processes to cores as Linux does")


def write_cores(path):
    print("some words")
    pathlib.Path(path).write_text(
        f"{sorted(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']} {os.environ['EXTRA']}"
    )


def refuse(path):
    raise UserError(f"{path} is not for me")


def stay(path):
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def run(jobs, places, when_waiting=lambda: None):
    statuses = {}
    run_jobs(jobs, places, {"EXTRA": "word"}, lambda job, status: statuses.update({job.name: status}), when_waiting)
    return statuses


@LINUX
def test_jobs_run_on_their_cores_and_fail_alone(tmp_path):
    core = min(os.sched_getaffinity(0))
    functions = {"bad": refuse, "good": write_cores, "other": write_cores}
    jobs = [
        Job(name, function, (str(tmp_path / name),), tmp_path / f"{name}.log") for name, function in functions.items()
    ]
    assert run(jobs, [[core]]) == {"bad": 1, "good": 0, "other": 0}
    assert (tmp_path / "good").read_text() == (tmp_path / "other").read_text() == f"[{core}] 1 word"
    assert (tmp_path / "good.log").read_text() == "some words\n"
    assert (tmp_path / "bad.log").read_text() == f"error: {tmp_path / 'bad'} is not for me\n"


def read_pid(path):
    for _ in range(200):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    raise AssertionError(f"{path} was never written")


def wait_until_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        stat = pathlib.Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # dead, and its adopter has not looked yet
        time.sleep(0.1)
    raise AssertionError(f"process {pid} lives on")


@LINUX
def test_a_job_ends_with_its_killed_parent(tmp_path):
    code = (
        "import pathlib, sys; sys.path[:0] = [{!r}, {!r}]\n"
        "import test_process_pool as t\n"
        "folder = pathlib.Path({!r})\n"
        "t.run([t.Job('long', t.stay, (str(folder / 'pid'),), folder / 'log')], [[]])\n"
    ).format(str(ROOT), str(ROOT / "tests"), str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        pid = read_pid(tmp_path / "pid")
        parent.send_signal(signal.SIGKILL)
    wait_until_gone(pid)


def test_an_interrupt_ends_the_jobs(tmp_path):
    def interrupt():
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Job("long", stay, (str(tmp_path / "pid"),), tmp_path / "log")], [[]], interrupt)
    wait_until_gone(read_pid(tmp_path / "pid"))


@LINUX
def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 1, 7, 2})
    assert split_cores(1) == [[1, 2, 4, 7]]
    assert split_cores(2) == [[1, 2], [4, 7]]
    assert split_cores(3) == [[1], [2], [4]]
    assert split_cores(5) == [[1], [2], [4], [7], [1]]
