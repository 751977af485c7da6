"""The ordered map: order, bounded look-ahead, errors, deaths, and no worker left behind."""

import math
import operator
import os
import pathlib
import subprocess
import sys
import time

import pytest

from cxa_jax.data.parallel import count_cores, ordered_map


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 5, 40])
def test_results_come_in_order(num_workers, num_tasks):
    assert list(ordered_map(operator.neg, range(num_tasks), num_workers)) == [-task for task in range(num_tasks)]


def test_large_results_and_printed_text_do_not_block_or_mix():
    assert list(ordered_map(bytes, [300_000] * 9, 2)) == [bytes(300_000)] * 9
    assert list(ordered_map(print, ["said by a task"] * 3, 2)) == [None] * 3


def test_read_ahead_is_bounded():
    taken = []
    tasks = (taken.append(task) or task for task in range(50))
    results = ordered_map(operator.neg, tasks, 2)
    for read in range(1, 11):
        next(results)
        assert len(taken) <= read + 4
    results.close()
    assert len(taken) < 50


def test_an_error_is_raised_in_its_turn():
    results = ordered_map(math.sqrt, [4.0, -1.0, 9.0], 2)
    assert next(results) == 2.0
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        next(results)


def test_a_dead_worker_is_reported():
    with pytest.raises(RuntimeError, match="status 3"):
        list(ordered_map(os._exit, [3, 3], 2))


def test_workers_end_with_the_map():
    results = ordered_map(process_id, range(20), 2)
    worker = next(results)
    assert worker != os.getpid()
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_zero_workers_means_all_cores():
    assert count_cores() >= 1
    assert list(ordered_map(operator.neg, [1, 2], 0)) == [-1, -2]


def process_id(task):
    return os.getpid()


PARENT = """
import operator, time
from cxa_jax.data.parallel import ordered_map
for result in ordered_map(operator.neg, range(9), 2):
    print(result, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="asks Linux which processes live")
def test_workers_end_when_their_parent_is_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout.readline().strip() == "0"
    workers = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
