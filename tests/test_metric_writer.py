"""metrics.csv and events: every row once, whatever earlier processes left, in whatever order the clock put them."""

import csv

from test_chaos import read_events

from cxa_jax.metric_writer import MetricWriter, count_rows

ROWS = [{"epoch": n, "step": 6 * n, "dev_loss": 1 / n, "data": "drawn"} for n in (1, 2, 3)]


def logged(folder):
    return [(event.step, round(event.summary.value[0].simple_value, 5)) for event in read_events(folder, "dev_loss")]


def test_each_start_leaves_every_row_once(tmp_path):
    with MetricWriter(tmp_path, (), "drawn") as writer:
        writer.write(ROWS[:1])
        writer.write(ROWS[:2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    later = events.with_name("events.out.tfevents.9999999999.of_a_clock_ahead")
    later.write_bytes(events.read_bytes()[:-7])  # of a killed process, with half a record
    with MetricWriter(tmp_path, ROWS[:1], "drawn") as writer:  # the checkpoint knew of one epoch
        assert count_rows(tmp_path / "metrics.csv") == 1
        writer.write(ROWS[:2])
        writer.write(ROWS)
    assert logged(tmp_path) == [(6, 1.0), (12, 0.5), (18, 0.33333)]
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["6", "12", "18"]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert count_rows(tmp_path / "none.csv") == 0
    (tmp_path / "damaged.csv").write_bytes(b"epoch\n\xff\n2\n")
    assert count_rows(tmp_path / "damaged.csv") == 2
