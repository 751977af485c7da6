"""launch.py, which kills itself by SIGKILL inside a write: run by test_chaos.py, with CHAOS=PLACE:CALL:DELAY_S.

PLACE names what is patched, CALL which of its calls starts the clock (0 the first), DELAY_S how long the process then
lives. Without CHAOS it is launch.py.
"""

import os
import pathlib
import runpy
import signal
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def kill_after(delay_s: float) -> None:
    def kill() -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    if delay_s:
        threading.Thread(target=kill, daemon=True).start()
    else:
        kill()


def patch(owner, name: str, call: int, delay_s: float) -> None:
    """Let `owner.name` start the clock at its call number `call`."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        if len(calls) == call:
            kill_after(delay_s)
        calls.append(1)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def find_place(name: str):
    """Return (owner, attribute): what a process does when it writes."""
    import orbax.checkpoint as ocp
    import tensorflow_datasets as tfds

    from cxa_jax import atomic_files, metric_writer
    from cxa_jax.data import datasets, record_writer

    return {
        "prepare": (record_writer.RepeatableWriter, "write"),  # a shard of the prepared data
        "finish_data": (tfds.core.DatasetInfo, "write_to_directory"),  # after the shards, before the renaming
        "index": (datasets.np, "savez_compressed"),
        "replace": (atomic_files.os, "replace"),  # every small file, between written and in its place
        "save": (ocp.CheckpointManager, "save"),  # a checkpoint, its background thread included
        "events": (metric_writer.EventsWriter, "write_event"),
    }[name]


if __name__ == "__main__":
    if "CHAOS" in os.environ:
        place, call, delay_s = os.environ["CHAOS"].split(":")
        patch(*find_place(place), int(call), float(delay_s))
    sys.argv[0] = str(ROOT / "launch.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
