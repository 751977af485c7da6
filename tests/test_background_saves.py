"""Saves beside training: what is written is the state as it was, in order, and no failure is lost."""

import errno
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from test_checkpointing import abstract, make_state

from cxa_jax.background_saves import BackgroundSaves
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.errors import UserError
from cxa_jax.interruption import Interrupted, end_on_signal, held_back

ORBAX_SAVE = "orbax.checkpoint.CheckpointManager.save"


class Gate:
    """orbax' save, held until it is opened; notes the folders in the order they were written to."""

    def __init__(self, monkeypatch):
        self.opened, self.kinds, original = threading.Event(), [], orbax.checkpoint.CheckpointManager.save

        def save(manager, *arguments, **options):
            assert self.opened.wait(60)
            self.kinds.append(manager.directory.name)
            return original(manager, *arguments, **options)

        monkeypatch.setattr(ORBAX_SAVE, save)


def test_the_next_step_may_write_over_a_state_that_is_not_on_disk_yet(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0)
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    with BackgroundSaves(tmp_path) as saves:
        saves.save(state, {"of": "step 1"}, is_best=True)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert not gate.kinds
        gate.opened.set()
    assert gate.kinds == ["best", "latest"]
    for kind in ("best", "latest"):
        with Checkpoints(tmp_path, kind, read_only=True) as store:
            restored, meta = store.restore(abstract(make_state(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, expected)
        assert meta == {"of": "step 1"}


def test_a_state_that_is_not_the_best_is_the_latest_alone(tmp_path):
    with BackgroundSaves(tmp_path) as saves:
        saves.save(make_state(1), {}, is_best=True)
        saves.save(make_state(2), {})
        saves.wait()
        assert saves.latest.steps() == [2, 1] and saves.best.steps() == [1]


def test_the_best_is_on_disk_before_a_latest_points_to_it(tmp_path, monkeypatch):
    original, found = orbax.checkpoint.CheckpointManager.save, []

    def save(manager, *arguments, **options):
        if manager.directory.name == "latest":
            found.append(sorted(path.name for path in (tmp_path / "checkpoints/best").glob("[0-9]*")))
        return original(manager, *arguments, **options)

    monkeypatch.setattr(ORBAX_SAVE, save)
    with BackgroundSaves(tmp_path) as saves:
        for step in (1, 2):
            saves.save(make_state(step), {}, is_best=True)
    assert found == [["1"], ["1", "2"]]


@pytest.mark.parametrize("asks", ["check", "the next save", "wait", "leaving"])
def test_a_full_disk_is_told_by_whatever_comes_next(tmp_path, monkeypatch, asks):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="cannot be written.*No space left"), BackgroundSaves(tmp_path) as saves:
        saves.save(make_state(1), {})
        saves.wait()
        monkeypatch.setattr(ORBAX_SAVE, fail)
        saves.save(make_state(2), {})
        if asks == "the next save":
            saves.save(make_state(3), {})
        elif asks == "check":  # as training does after each step
            for _ in range(1000):
                saves.check()
                time.sleep(0.01)
        elif asks == "wait":
            saves.wait()
    with Checkpoints(tmp_path, "latest", read_only=True) as latest:
        assert latest.steps() == [1]


def test_leaving_by_a_signal_waits_for_the_save(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(Interrupted), end_on_signal(), BackgroundSaves(tmp_path) as saves:
        saves.save(make_state(1), {})
        threading.Timer(0.3, gate.opened.set).start()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)  # the signal ends it
    with Checkpoints(tmp_path, "latest", read_only=True) as latest:
        assert latest.steps() == [1]


def test_a_signal_while_leaving_is_raised_once_all_is_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def notice():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.3, gate.opened.set).start()

    with pytest.raises(Interrupted), end_on_signal():
        with BackgroundSaves(tmp_path) as saves:
            saves.save(make_state(1), {})
            threading.Timer(0.3, notice).start()
    assert gate.kinds == ["latest"]
    with Checkpoints(tmp_path, "latest", read_only=True) as latest:
        assert latest.steps() == [1]


@pytest.mark.parametrize("asks", ["before leaving", "while leaving"])
def test_a_signal_does_not_hide_a_full_disk(tmp_path, monkeypatch, asks):
    """Else the exit status would say that the same command goes on, and it would end the same way each time."""
    gate = threading.Event()

    def fail(*_, **__):
        assert gate.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"), end_on_signal():
        with BackgroundSaves(tmp_path) as saves:
            monkeypatch.setattr(ORBAX_SAVE, fail)
            saves.save(make_state(1), {})
            threading.Timer(0.6, gate.set).start()
            if asks == "before leaving":
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(30)
            else:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_a_signal_does_not_hide_what_ends_training(tmp_path):
    with pytest.raises(UserError, match="the loss is nan"), end_on_signal():
        with BackgroundSaves(tmp_path) as saves, held_back():
            saves.save(make_state(1), {})
            os.kill(os.getpid(), signal.SIGTERM)
            raise UserError("the loss is nan")
    with Checkpoints(tmp_path, "latest", read_only=True) as latest:
        assert latest.steps() == [1]


def test_several_processes_save_without_a_thread(tmp_path, monkeypatch):
    """They take part in a save in one order with what else they do together, which a thread would not keep."""
    threads = []
    monkeypatch.setattr(Checkpoints, "save", lambda *_: threads.append(threading.current_thread()))
    with BackgroundSaves(tmp_path) as saves:
        saves.save(make_state(1), {})
        saves.wait()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            saves.save(make_state(2), {})
    assert [thread is threading.main_thread() for thread in threads] == [False, True]
