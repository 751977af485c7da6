"""One process holds a lock; a killed one leaves none behind."""

import pathlib
import subprocess
import sys
import threading

import pytest

from cxa_jax.file_lock import lock_file

ROOT = pathlib.Path(__file__).parents[1]
HOLDER = """
import pathlib, sys, time
from cxa_jax.file_lock import lock_file
with lock_file(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


class Taken(Exception):
    pass


def refuse(holder):
    raise Taken(holder)


def test_another_process_is_refused_by_name_until_the_holder_is_killed(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Taken, match=f"process {holder.pid} on "), lock_file(path, refuse):
        pass
    holder.kill()
    holder.wait()
    with lock_file(path, refuse):
        assert path.exists()


def test_one_that_waits_gets_it_afterwards(tmp_path):
    order = []
    told = threading.Event()

    def wait():
        with lock_file(tmp_path / "lock", lambda _: told.set()):
            order.append("second")

    thread = threading.Thread(target=wait)
    with lock_file(tmp_path / "lock", refuse):
        thread.start()
        assert told.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), lock_file(tmp_path / "none" / "lock", refuse):
        pass
