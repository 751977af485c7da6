"""A real training process, stopped anywhere, by SIGKILL or SIGTERM, goes on as if nothing had happened."""

import csv
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
import tiny_launch
from tensorboardX.proto.event_pb2 import Event

from cxa_jax import run as run_module
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.interruption import RESUMABLE

PROGRAM = pathlib.Path(__file__).with_name("chaos_program.py")
# Where a process may kill itself, and how many of its calls to choose from.
PLACES = {"prepare": 3, "finish_data": 1, "index": 1, "replace": 14, "save": 12, "events": 12}
LONGEST_DELAY_S = 0.3  # within a write: a checkpoint takes about a tenth of a second
NUM_KILLS = 100


class Trial:
    """A workdir and a data folder of their own, and one command that is given again and again."""

    def __init__(self, folder: pathlib.Path):
        self.workdir, self.num_starts, self.num_notices = folder / "run", 0, 0
        config = PROGRAM.with_name("tiny_launch.py")
        self.command = [sys.executable, str(PROGRAM), f"--config={config}", f"--workdir={self.workdir}"]
        self.command.append(f"--config.data.data_dir={folder / 'data'}")

    def start(self, chaos: str = "", after_s: float | None = None, number: int = signal.SIGKILL) -> int:
        """Give the command, send it a signal after a time if asked, and return its exit status."""
        self.num_starts += 1
        environment = os.environ | ({"CHAOS": chaos} if chaos else {})
        process = subprocess.Popen(self.command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            _, self.messages = process.communicate(timeout=after_s or 300)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            self.num_notices += number == signal.SIGTERM
            _, self.messages = process.communicate(timeout=60)
        # As Python itself starts nothing can answer a signal yet.
        expected = {-signal.SIGKILL} if number == signal.SIGKILL else {RESUMABLE, -number}
        assert process.returncode in {0} | expected, f"{chaos} {after_s} {number}:\n{self.messages[-3000:]}"
        assert "Traceback" not in self.messages, self.messages[-3000:]
        return process.returncode


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    trial = Trial(tmp_path_factory.mktemp("uncut"))
    assert trial.start() == 0
    return trial


def assert_same(uncut: Trial, trial: Trial):
    for kind in ("latest", "best"):
        (state, meta), (expected, expected_meta) = (read_state(one.workdir, kind) for one in (trial, uncut))
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        for name in ("progress", "root_key", "fingerprint"):
            assert meta[name] == expected_meta[name]
        steps, expected_steps = (list_steps(one.workdir, kind) for one in (trial, uncut))
        assert steps[-1] == expected_steps[-1]
        assert trial.num_notices or steps == expected_steps  # a notice saves one more, where it is answered
    exact = ("metrics.csv", "predictions_dev.csv", "predictions_test.csv", "localization_test.csv")
    for name in (*exact, "input_statistics.json"):
        assert (trial.workdir / name).read_bytes() == (uncut.workdir / name).read_bytes(), name
    numbers, expected = (json.loads((one.workdir / "metrics.json").read_text()) for one in (trial, uncut))
    for report in (numbers, expected):
        del report["environment"], report["config"]  # time and command; data_dir
    assert numbers == expected
    with (trial.workdir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    losses = [(event.step, event.summary.value[0].simple_value) for event in read_events(trial.workdir, "dev_loss")]
    assert losses == [(int(row["step"]), np.float32(row["dev_loss"])) for row in rows]
    sessions = json.loads((trial.workdir / "environment.json").read_text())
    assert 1 <= len(sessions) <= trial.num_starts
    assert not [path for name in ("*checkpoint-tmp*", "*.tmp", "*.replaced") for path in trial.workdir.rglob(name)]
    assert not list((trial.workdir.parent / "data").rglob("incomplete.*"))


def read_state(workdir: pathlib.Path, kind: str):
    run = run_module.create_run(tiny_launch.get_config(), tiny.make_dataset())
    with Checkpoints(workdir, kind, read_only=True) as checkpoints:
        state, meta = checkpoints.restore(run.abstract_state)
    return jax.device_get(state), meta


def list_steps(workdir: pathlib.Path, kind: str) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints" / kind).iterdir())


def read_events(workdir: pathlib.Path, tag: str) -> list[Event]:
    """Read the only event file, a row of TFRecords: length (8 bytes), its checksum (4), data, its checksum (4)."""
    (path,) = (workdir / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return [event for event in events if event.summary.value and event.summary.value[0].tag == tag]


def test_killed_run_equals_uncut_run(uncut, tmp_path):
    """One kill each: while the data are prepared, inside a checkpoint's write, before a file takes its place."""
    trial = Trial(tmp_path)
    for chaos in ("prepare:1:0", "save:5:0.02", "replace:6:0"):
        assert trial.start(chaos) == -signal.SIGKILL, trial.messages[-2000:]
    assert trial.start() == 0
    assert "resuming" in trial.messages
    assert_same(uncut, trial)


@pytest.mark.slow  # test_train.py has the signal in one process
def test_a_notice_in_the_middle_of_training_saves(uncut, tmp_path):
    trial = Trial(tmp_path)
    process = subprocess.Popen(trial.command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(trial.workdir.glob("checkpoints/latest/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == RESUMABLE and "stopped by SIGTERM; the same command goes on" in messages, messages
    assert list_steps(trial.workdir, "latest")
    trial.num_starts = trial.num_notices = 1
    assert trial.start() == 0 and "resuming" in trial.messages
    assert_same(uncut, trial)


@pytest.mark.slow
def test_a_hundred_kills(uncut, tmp_path):
    """By a clock outside, anywhere in a process' life; or from inside a write. Then to the end, undisturbed.

    Between them notices by SIGTERM, which save a state that a kill may then meet as it is replaced.
    """
    rng, num_kills, num_trials = random.Random(time.time_ns()), 0, 0
    life_s = _measure_life(Trial(tmp_path / "measured"))
    while num_kills < NUM_KILLS:
        trial = Trial(tmp_path / f"trial{num_trials}")
        num_trials += 1
        status, from_inside = None, 0
        while status != 0 and num_kills < NUM_KILLS:
            if rng.random() < 0.2:
                status = trial.start(after_s=rng.random() * life_s, number=signal.SIGTERM)
                continue
            if rng.random() < 0.5:
                place = rng.choice(list(PLACES))
                status = trial.start(
                    f"{place}:{rng.randrange(PLACES[place])}:{rng.choice([0, rng.random() * LONGEST_DELAY_S])}"
                )
                from_inside += status != 0
            else:
                status = trial.start(after_s=rng.random() * life_s)
            num_kills += status != 0
        if status != 0:
            assert trial.start() == 0
        print(
            f"{trial.num_starts} starts, {from_inside} killed from inside a write, {trial.num_notices} notices; "
            f"{num_kills} kills so far",
            flush=True,
        )
        assert_same(uncut, trial)


def _measure_life(trial: Trial) -> float:
    start = time.monotonic()
    assert trial.start() == 0
    return time.monotonic() - start
