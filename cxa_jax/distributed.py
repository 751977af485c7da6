"""Several processes as one run: join them, let the first alone write, and end all when one of them is gone.

Every process runs the same program on its own devices and ends with the same numbers. Process 0 prepares data and
writes files; the others write theirs to a folder that goes away.
"""

import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed  # its barrier waits without the devices' time limits
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cxa_jax.console import be_quiet
from cxa_jax.errors import UserError
from cxa_jax.interruption import RESUMABLE, Interrupted, check, held_back, is_asked

HEARTBEAT_TIMEOUT_S = 60  # a process that is silent for so long is taken for dead
START_TIMEOUT_S = 300
MODES = ("train", "evaluate")
PREPARATION_TIMEOUT_S = 24 * 3600
LOST = "another process of this run is gone (its own message says why); start all of them again: they go on from the "
LOST += "last checkpoint"

_numbers = itertools.count()  # of barriers: no two share a name
_ENDED, _STOP = "cxa_jax/ended", "cxa_jax/stop"
# A process may be one step ahead of another: it waits for the metrics of the step before, which take all of them.
_STEPS_AHEAD = 2
RUNTIME_ERRORS = (jax.errors.JaxRuntimeError, ValueError)  # on its way through a callback it becomes the latter
SIGNS_OF_LOSS = ("Gloo", "NCCL", "Barrier failed", "heartbeat", "coordination service", "UNAVAILABLE", "closed by peer")


class AllStop(Interrupted):
    """All processes of this run end here together, and what they had is saved."""


@contextlib.contextmanager
def joined(coordinator: str, num_processes: int, process_id: int, auto: bool, mode: str = "train") -> Iterator[None]:
    """Make this process one of several for the block, or none at all where nothing asks for it.

    Any end of the block but a good one ends the process at once, so that the others do not wait for it.

    Args:
      coordinator: HOST:PORT of process 0; '' with `auto` or for a single process.
      num_processes: how many there are; 0 if not given.
      process_id: 0 ... num_processes - 1; -1 if not given.
      auto: take all three from Slurm, Open MPI or the TPU's environment.
      mode: what they do together, one of MODES.

    Raises:
      UserError: the three do not go together, the mode is none of MODES, or the others do not come within
        START_TIMEOUT_S.
    """
    if not _check(coordinator, num_processes, process_id, auto):
        yield
        return
    if mode not in MODES:
        raise UserError(f"--mode={mode} takes one process; several can {' and '.join(MODES)}")
    watcher = _initialize({} if auto else dict(zip(("coordinator_address", "num_processes", "process_id"),
                                         (coordinator, num_processes, process_id), strict=True)))  # fmt: skip
    try:
        yield
        with held_back(check_at_end=False):
            _take_leave(watcher)
    except SystemExit as end:
        if end.code not in (0, None):
            _leave(end.code)
    except (UserError, OSError) as error:
        _leave(f"error: {error}")
    except AllStop as notice:
        sys.stderr.write(f"stopped by {notice}, all together; the same commands go on\n")
        # All is saved, whatever becomes of the others now.
        with held_back(check_at_end=False), contextlib.suppress(*RUNTIME_ERRORS):
            _take_leave(watcher)
        _leave(RESUMABLE)
    except Interrupted as notice:
        sys.stderr.write(f"stopped by {notice}; the same commands go on from the last checkpoint\n")
        _leave(RESUMABLE)
    except BaseException as error:
        if isinstance(error, RUNTIME_ERRORS) and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            _leave(f"error: {LOST}\n  ({str(error).splitlines()[0][:200]})")
        sys.excepthook(*sys.exc_info())
        _leave(1)


def is_first() -> bool:
    """Tell whether this process prepares, writes and speaks for all."""
    return jax_distributed.global_state.process_id == 0


def barrier(name: str, timeout_s: int = START_TIMEOUT_S) -> None:
    """Return when every process is here; nothing to wait for in a single process."""
    if not jax.distributed.is_initialized():
        return
    place, failures = f"cxa_jax/{name}/{next(_numbers)}", []

    def wait() -> None:
        try:
            jax_distributed.global_state.client.wait_at_barrier(place, timeout_s * 1000)
        except RUNTIME_ERRORS as error:
            failures.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive():  # not in jax, where no signal is heard: preparing data takes hours
        waiting.join(1.0)
    if failures:
        raise failures[0]


def is_stop_due(step: int) -> bool:
    """Tell whether to save and end after a training step, because a signal has reached this process or another.

    All processes of a run get True at the same step, the second after the one at whose end the first of them saw its
    signal: it writes that step down where all look after each of theirs.

    Args:
      step: of the whole training, the same for all processes.
    """
    if not jax.distributed.is_initialized():
        return is_asked()
    if is_asked():
        _propose_stop(step + _STEPS_AHEAD)
    agreed = _find_stop()
    return agreed is not None and step >= agreed


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Hold signals back where several processes work together: the body asks by `is_stop_due` and `agree_to_stop`.

    A signal that comes as they agree for the last time is answered where they next do, or not at all: nothing is left.

    Raises:
      AllStop: at the end, if a signal came after the body last asked.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    with held_back(check_at_end=False):
        yield
        stop_if_agreed()


def stop_if_agreed() -> None:
    """End as `stop` does where `agree_to_stop` says so."""
    if agree_to_stop():
        stop()


def agree_to_stop() -> bool:
    """Tell, between steps, whether to save and end; several processes wait for each other and hear the same."""
    if not jax.distributed.is_initialized():
        return is_asked()
    if is_asked():
        _propose_stop(0)
    barrier("stop", PREPARATION_TIMEOUT_S)
    agreed = _find_stop() is not None
    barrier("stop heard", PREPARATION_TIMEOUT_S)  # no one proposes before all have looked
    return agreed


def stop() -> NoReturn:
    """End a training whose state is saved.

    Raises:
      Interrupted: alone.
      AllStop: as one of several, all of which get here.
    """
    if not jax.distributed.is_initialized():
        check()
    raise AllStop("a signal to one of the processes")


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Run the block in process 0, then in the others, which find what it left on disk."""
    if not is_first():
        barrier(name, PREPARATION_TIMEOUT_S)
    yield
    if is_first():
        barrier(name, PREPARATION_TIMEOUT_S)


@contextlib.contextmanager
def writable(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield where this process may write: `folder` for process 0; a folder that goes away for the others.

    So all processes run the same lines, and no step that takes all of them is ever run by some.
    """
    if is_first():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cxa_jax_") as scratch:
        yield pathlib.Path(scratch)


def _propose_stop(step: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
        jax_distributed.global_state.client.key_value_set(_STOP, str(step))


def _find_stop() -> int | None:
    try:
        return int(jax_distributed.global_state.client.key_value_try_get(_STOP))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _check(coordinator: str, num_processes: int, process_id: int, auto: bool) -> bool:
    """Return whether several processes are asked for."""
    given = bool(coordinator), num_processes > 0, process_id >= 0
    if auto:
        if any(given):
            raise UserError("--distributed=auto finds --coordinator, --num_processes and --process_id by itself")
        return True
    if not any(given):
        return False
    if not all(given) or process_id >= num_processes:
        raise UserError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: all three are "
            "needed, the last from 0 to num_processes - 1"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as node1:29400")
    return True


def _initialize(arguments: dict[str, Any]) -> threading.Thread:
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=START_TIMEOUT_S, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0][:300]
        raise UserError(f"the processes of this run did not come together: {reason}") from error
    watcher = threading.Thread(target=_watch_first, daemon=True)
    if not is_first():
        be_quiet()
        watcher.start()
    # On CPUs the devices must connect within 30 s of each other: now, not when one has compiled long before the other.
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    ones = np.ones(len(jax.devices()), np.float32)
    connect = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    connect(jax.make_array_from_callback(ones.shape, sharding, ones.__getitem__)).block_until_ready()
    return watcher


def _take_leave(watcher: threading.Thread) -> None:
    """Wait for all, then let the watchers go: a thread that waits in jax must not outlive the interpreter."""
    barrier("end", PREPARATION_TIMEOUT_S)
    if is_first():
        jax_distributed.global_state.client.key_value_set(_ENDED, "")
    else:
        watcher.join()


def _watch_first() -> None:
    """Speak before jax does when process 0 is gone: its way is an abort with a stack of C++."""
    while True:
        try:
            jax_distributed.global_state.client.blocking_key_value_get(_ENDED, 3600 * 1000)
            return
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                _leave(f"error: {LOST}")


def _leave(code: int | str) -> NoReturn:
    """End without jax's farewell, which waits for processes that may be gone."""
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)
