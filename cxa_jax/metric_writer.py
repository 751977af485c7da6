"""Numbers of a run as they come: metrics.csv and TensorBoard events. No TensorFlow."""

import csv
import io
import pathlib
from typing import Any

from tensorboardX import SummaryWriter

from cxa_jax.workdir import write_atomically

Row = dict[str, Any]


class MetricWriter:
    """Writes one row an epoch. The history travels in the checkpoint, so a resumed run loses and doubles no row."""

    def __init__(self, workdir: pathlib.Path, first_step: int, data: str):
        self._csv = workdir / "metrics.csv"
        # purge_step hides the events of steps that a cut run logged and that will be done again.
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step, flush_secs=30)
        self._events.add_text("data", data, first_step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def write(self, history: list[Row]) -> None:
        """Rewrite metrics.csv with all rows and add the last one's numbers to the events, at its `step`."""
        write_history(self._csv, history)
        for name, value in history[-1].items():
            if isinstance(value, float):
                self._events.add_scalar(name, value, history[-1]["step"])
        self._events.flush()


def write_history(path: pathlib.Path, history: list[Row]) -> None:
    """Write rows as CSV, all or nothing; floats in full."""
    text = io.StringIO()
    if history:
        fields = dict.fromkeys(name for row in history for name in row)
        writer = csv.DictWriter(text, fieldnames=list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_atomically(path, text.getvalue())
