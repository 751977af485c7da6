"""Localisation scores on disk and summed up: an exact round trip, one run as `summarize`, several as their mean."""

import dataclasses
import pathlib

import numpy as np
import pytest
from finished_runs import draw_predictions, make_test_split, score_boxes_of

from cxa_jax.errors import UserError
from cxa_jax.intervals import Interval, widen_difference
from cxa_jax.localization import score_boxes, summarize
from cxa_jax.localization_table import (
    GAIN,
    MAP_CONTROL_METRICS,
    find_answering_rule,
    find_judged_rules,
    find_leading_map,
    is_control,
    read_localization,
    split_control,
    summarize_tables,
    write_localization,
)
from cxa_jax.statistics import bootstrap_means


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
        for metric, interval in expected.items():
            if found[metric] is not None:
                ends = {end: getattr(interval, end) for end in found[metric]}
                assert found[metric] == pytest.approx(ends, rel=1e-12)
        assert found["heart_energy_ratio"] is None  # undefined without masks: not 0


def test_several_runs_give_the_mean_over_runs(tables):
    report = summarize_tables(tables, num_resamples=50, seed=0)["all_boxed"]
    each = [table.scores["attention", "wang"].iou.mean() for table in tables]
    assert each[0] != each[1]
    assert report["rules"]["wang"]["attention"]["mean_iou"]["estimate"] == pytest.approx(np.mean(each))
    assert report["num_images"] == [len(tables[0].ids)] * 2
    assert report["num_patients"] == len(np.unique(tables[0].patients))


def test_the_gain_over_the_median_box_is_paired(tables):
    rules = summarize_tables(tables[:1], num_resamples=300, seed=0)["all_boxed"]["rules"]["half_max"]
    control, own = (tables[0].scores[name, "half_max"] for name in ("median_box", "attention"))
    expected = bootstrap_means({"gain": own.iou - control.iou}, own.patients, num_resamples=300)["gain"]
    gain = rules["attention"][GAIN]
    assert gain == pytest.approx({end: getattr(expected, end) for end in gain}, rel=1e-12)
    assert gain["estimate"] == pytest.approx(rules["attention"]["mean_iou"]["estimate"] - control.iou.mean())
    assert not any(GAIN in rules[name] for name in rules if is_control(name))


def _expect_gain(own, control, metric: str) -> Interval:
    gains = {"gain": getattr(own, metric) - getattr(control, metric)}
    expected = bootstrap_means(gains, own.patients, num_resamples=200)["gain"]
    # All boxes are one, so no two maps aim apart: what never varied still has a width, but for a ratio without bounds.
    return expected if metric == "energy_ratio" else widen_difference(expected, len(np.unique(own.patients)))


def test_the_gain_over_the_images_thumbnail_is_paired_with_every_map(tables):
    rules = summarize_tables(tables[:1], num_resamples=200, seed=0)["all_boxed"]["rules"]["phantom_tuned"]
    control = tables[0].scores["thumbnail", "phantom_tuned"]
    for name in ("attention", "cam", "evidence_absolute"):
        own = tables[0].scores[name, "phantom_tuned"]
        for metric in ("iou", "pointing", "energy_ratio"):
            expected = _expect_gain(own, control, metric)
            found = rules[name][f"{metric}_above_thumbnail"]
            assert found == pytest.approx({end: getattr(expected, end) for end in found}, rel=1e-12)
    assert rules["thumbnail"]["mean_iou"]["estimate"] == pytest.approx(control.iou.mean())
    controls = [name for name in rules if is_control(name)]
    assert "thumbnail" in controls and not any("iou_above_thumbnail" in rules[name] for name in controls)
    old = {key: values for key, values in tables[1].scores.items() if key[0] != "thumbnail"}
    pair = [tables[0], dataclasses.replace(tables[1], scores=old)]
    found = summarize_tables(pair, num_resamples=20, seed=0)["all_boxed"]["rules"]["half_max"]["attention"]
    assert "iou_above_thumbnail" not in found and GAIN in found


def test_gains_over_a_maps_own_controls_are_paired(tables):
    rules = summarize_tables(tables[:1], num_resamples=200, seed=0)["all_boxed"]["rules"]["half_max"]
    own = tables[0].scores["evidence_absolute", "half_max"]
    for control in ("random_weights", "mean_map", "shuffled"):
        other = tables[0].scores[f"{control}_evidence_absolute", "half_max"]
        for metric in ("iou", "pointing", "energy_ratio"):
            expected = _expect_gain(own, other, metric)
            found = rules["evidence_absolute"][f"{metric}_above_{control}"]
            # Sums over images are of other matrices, so their rounding differs.
            assert found == pytest.approx({end: getattr(expected, end) for end in found}, rel=1e-12)
            assert expected.low < expected.high
    pair = summarize_tables(tables, num_resamples=200, seed=0)["all_boxed"]["rules"]["half_max"]
    each = [
        np.mean(t.scores["grad_cam", "half_max"].energy_ratio - t.scores["shuffled_grad_cam", "half_max"].energy_ratio)
        for t in tables
    ]
    gain = pair["grad_cam"]["energy_ratio_above_shuffled"]
    assert gain["estimate"] == pytest.approx(np.mean(each)) and gain["low"] < gain["estimate"] < gain["high"]
    assert set(rules["shuffled_evidence"]) == set(MAP_CONTROL_METRICS)


def test_a_control_that_one_of_the_runs_lacks_gives_no_gain(tables):
    old = {key: values for key, values in tables[1].scores.items() if not key[0].startswith("shuffled_")}
    pair = [tables[0], dataclasses.replace(tables[1], scores=old)]
    for some in (pair, pair[::-1]):
        found = summarize_tables(some, num_resamples=20, seed=0)["all_boxed"]["rules"]["half_max"]["attention"]
        assert "iou_above_shuffled" not in found and "iou_above_mean_map" in found


def test_the_rule_that_answers_is_fixed_beforehand(tables):
    maps = {"attention": 0, "median_box": 0}
    assert find_answering_rule({"half_max": maps, "wang": maps}) == "half_max"
    assert find_answering_rule({"half_max": maps, "phantom_tuned": maps}) == "phantom_tuned"
    assert find_answering_rule({"half_max": maps, "phantom_tuned": {"median_box": 0}}) == "half_max"
    assert find_answering_rule({"half_max": {"shuffled_attention": 0}}) is None
    assert tables[0].answering_rule == "phantom_tuned"
    read = {"all_maps": 0, "attention": 0, "thumbnail": 0}
    rules = {"half_max": maps, "phantom_tuned": maps, "wang": maps, "phantom_reader": read}
    assert find_answering_rule(rules) == "phantom_tuned"
    assert find_judged_rules(rules) == ["phantom_tuned", "phantom_reader"]  # and what a regression adds beside it
    assert find_judged_rules({"half_max": maps, "phantom_reader": {"thumbnail": 0}}) == ["half_max"]
    assert find_judged_rules({"phantom_reader": read}) == ["phantom_reader"] and not find_judged_rules({"wang": maps})


def test_a_single_boxed_patient_has_no_control_and_no_crash(tables):
    one = tables[0].take(np.arange(len(tables[0].ids)) == 0)
    nothing = score_boxes(np.full((1, 4), np.nan), [[0, 0, 9, 9]], one.patients)  # what `score_controls` says of one
    one = dataclasses.replace(one, scores=one.scores | {("median_box", "half_max"): nothing})
    rules = summarize_tables([one], num_resamples=20, seed=0)["all_boxed"]["rules"]["half_max"]
    assert rules["median_box"]["mean_iou"] is None and rules["attention"][GAIN] is None
    assert rules["attention"]["mean_iou"]["estimate"] == one.scores["attention", "half_max"].iou.mean()


def test_the_map_that_answers_is_fixed_beforehand():
    assert find_leading_map(["random_weights_attention", "evidence", "weights", "attention"]) == "attention"
    assert find_leading_map(["grad_cam", "cam", "evidence", "median_box"]) == "evidence"
    assert find_leading_map(["attention", "all_maps", "thumbnail_and_maps"]) == "all_maps"  # of a fitted reader
    assert find_leading_map(["cam"]) == "cam" and find_leading_map(["median_box", "thumbnail"]) is None


def test_maps_that_one_of_the_runs_lacks_are_left_out(tables):
    old = {key: values for key, values in tables[1].scores.items() if key[0] not in ("grid_box", "attention")}
    pair = [tables[0], dataclasses.replace(tables[1], scores=old)]
    for some in (pair, pair[::-1]):
        names = summarize_tables(some, num_resamples=20, seed=0)["all_boxed"]["rules"]["half_max"]
        assert "median_box" in names and not {"grid_box", "attention"} & names.keys()


def test_controls_are_known_by_name():
    shared = ("median_box", "image_centre", "random_map", "grid_box", "thumbnail")
    assert all(map(is_control, (*shared, "random_weights_attention")))
    assert is_control("shuffled_evidence") and is_control("mean_map_cam")
    assert split_control("random_weights_grad_cam") == ("random_weights", "grad_cam")
    assert split_control("weights") == (None, "weights") and split_control("thumbnail") == (None, "thumbnail")
    assert not any(map(is_control, ("attention", "weights", "evidence", "cam", "grad_cam")))


def test_other_columns_are_named(tmp_path: pathlib.Path):
    (tmp_path / "old.csv").write_text("map,rule,id\nattention,wang,a\n")
    with pytest.raises(UserError, match="old.csv has other columns"):
        read_localization(tmp_path / "old.csv")
