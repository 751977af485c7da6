"""Localisation scores on disk and summed up: an exact round trip, one run as `summarize`, several as their mean."""

import pathlib

import numpy as np
import pytest
from finished_runs import draw_predictions, make_test_split, score_boxes_of

from cxa_jax.errors import UserError
from cxa_jax.localization import summarize
from cxa_jax.localization_table import is_control, read_localization, summarize_tables, write_localization


@pytest.fixture(scope="module")
def tables():
    split = make_test_split()
    return [score_boxes_of(split, draw_predictions(split, seed, 1.5, "amm"), 0.5) for seed in (0, 1)]


def test_what_is_written_is_read_back_exactly(tables, tmp_path: pathlib.Path):
    write_localization(tmp_path / "boxes.csv", tables[0])
    back = read_localization(tmp_path / "boxes.csv")
    assert back.ids.tolist() == tables[0].ids.tolist()
    assert back.predicted_positive.tolist() == tables[0].predicted_positive.tolist()
    assert list(back.scores) == list(tables[0].scores)
    for key, scores in tables[0].scores.items():
        for name, values in vars(scores).items():
            np.testing.assert_array_equal(getattr(back.scores[key], name), values)


def test_one_run_is_summed_up_as_its_scores_are(tables):
    report = summarize_tables(tables[:1], num_resamples=50, seed=0)
    for which, keep in (("all_boxed", slice(None)), ("predicted_positives", tables[0].predicted_positive)):
        assert report[which]["num_images"] == [len(tables[0].ids[keep])]
        expected = summarize(tables[0].scores["evidence", "half_max"].subset(keep), num_resamples=50)
        found = report[which]["rules"]["half_max"]["evidence"]
        assert found["mean_iou"]["estimate"] == expected["mean_iou"].estimate
        assert (found["pointing"]["low"], found["pointing"]["high"]) == (
            expected["pointing"].low,
            expected["pointing"].high,
        )
        assert "heart_energy_ratio" not in found  # undefined without masks: left out, not 0


def test_several_runs_give_the_mean_over_runs(tables):
    report = summarize_tables(tables, num_resamples=50, seed=0)["all_boxed"]
    each = [table.scores["attention", "wang"].iou.mean() for table in tables]
    assert each[0] != each[1]
    assert report["rules"]["wang"]["attention"]["mean_iou"]["estimate"] == pytest.approx(np.mean(each))
    assert report["num_images"] == [len(tables[0].ids)] * 2
    assert report["num_patients"] == len(np.unique(tables[0].patients))


def test_controls_are_known_by_name():
    assert all(map(is_control, ("median_box", "image_centre", "random_map", "random_weights_attention")))
    assert not any(map(is_control, ("attention", "weights", "evidence", "cam", "grad_cam")))


def test_other_columns_are_named(tmp_path: pathlib.Path):
    (tmp_path / "old.csv").write_text("map,rule,id\nattention,wang,a\n")
    with pytest.raises(UserError, match="old.csv has other columns"):
        read_localization(tmp_path / "old.csv")
