"""Numbers of a run as they come: metrics.csv and TensorBoard events. No TensorFlow."""

import csv
import io
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from cxa_jax.workdir import write_atomically

Row = dict[str, Any]


class MetricWriter:
    """Writes one row an epoch. The history travels in the checkpoint, so a resumed run loses and doubles no row.

    Each start writes the events anew, as one file: a killed process may have left half a record, and viewers put files
    into the order of the clock, which may have been set back. Their wall times are those of this writing.
    """

    def __init__(self, workdir: pathlib.Path, history: Sequence[Row], data: str):
        self._csv = workdir / "metrics.csv"
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        for former in folder.glob("events.out.tfevents.*"):
            former.unlink()
        self._events = EventsWriter(str(folder / "events"))
        self._events.write_event(Event(wall_time=time.time(), summary=summary.text("data", data)))
        write_history(self._csv, history)
        for row in history:
            self._add_events(row)
        self._events.flush()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def write(self, history: Sequence[Row]) -> None:
        """Rewrite metrics.csv with all rows and add the last one's numbers to the events, at its `step`."""
        write_history(self._csv, history)
        self._add_events(history[-1])
        self._events.flush()

    def _add_events(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                scalar = summary.scalar(name, value)
                self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=scalar))


def count_rows(path: pathlib.Path) -> int:
    """Return the number of rows below the header of a CSV file; 0 if there is none."""
    return max(0, len(path.read_bytes().splitlines()) - 1) if path.is_file() else 0


def write_history(path: pathlib.Path, history: Sequence[Row]) -> None:
    """Write rows as CSV, all or nothing; floats in full."""
    text = io.StringIO()
    if history:
        fields = dict.fromkeys(name for row in history for name in row)
        writer = csv.DictWriter(text, fieldnames=list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_atomically(path, text.getvalue())
