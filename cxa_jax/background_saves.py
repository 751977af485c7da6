"""The states of a run under training, written beside it: training waits for a save only if the next one is due."""

import concurrent.futures
import pathlib
from typing import Any

import jax

from cxa_jax.checkpointing import Checkpoints
from cxa_jax.interruption import held_back
from cxa_jax.train_state import TrainState


class BackgroundSaves:
    """The stores `latest` and `best` of a run, and one thread that writes to them; leaving it waits for all saves.

    A state is fetched to the host at once, since the next step writes over it (a processor's arrays are not copied for
    that: jax then writes elsewhere); digests, orbax and the disk are the thread's. Several processes save at once,
    without a thread: each save takes all of them, in one order with whatever else they do together.
    """

    def __init__(self, workdir: pathlib.Path):
        self.latest, self.best = Checkpoints(workdir, "latest"), Checkpoints(workdir, "best")
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="saves")
        self._pending = None

    def __enter__(self) -> "BackgroundSaves":
        return self

    def __exit__(self, *exception: Any) -> None:
        # held back throughout: a signal must neither cut this short nor hide that a save has failed
        with held_back(check_at_end=exception[0] is None), self.latest, self.best:
            self._pool.shutdown()
            self.wait()

    def save(self, state: TrainState, meta: dict[str, Any], *, is_best: bool = False) -> None:
        """Write a state as the latest, and before that as the best if it is; a crash leaves the former ones whole.

        Raises:
          UserError: the save before this one cannot be written.
        """
        self.wait()
        if jax.process_count() > 1:
            self._write(state, meta, is_best)
        else:
            self._pending = self._pool.submit(self._write_whole, jax.device_get(state), meta, is_best)

    def check(self) -> None:
        """Raise the UserError of a save that has failed by now; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
          UserError: it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self.latest.wait()

    def _write_whole(self, state: TrainState, meta: dict[str, Any], is_best: bool) -> None:
        self._write(state, meta, is_best)
        self.latest.wait()

    def _write(self, state: TrainState, meta: dict[str, Any], is_best: bool) -> None:
        if is_best:
            self.best.save(state, meta)
            self.best.wait()  # on disk before a newer latest can point to it
        self.latest.save(state, meta)
