"""Groups of runs: one run is the plain bootstrap, several add the seeds' variance, differences are paired."""

import math

import numpy as np
import pytest
from scipy import special, stats

from cxa_jax.comparison import compute_delong_test, paired_bootstrap
from cxa_jax.group_statistics import bootstrap_group, bootstrap_group_means, compare_groups, compute_group_delong
from cxa_jax.intervals import bound_calibration_bias
from cxa_jax.seed_comparison import combine, compare, sample_auroc, sample_means
from cxa_jax.statistics import bootstrap_interval, bootstrap_means


def _draw(seed: int, num_runs: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.4).astype(int)
    return labels, np.arange(200) // 2, [1 / (1 + np.exp(-rng.normal(labels))) for _ in range(num_runs)]


def test_one_run_is_the_plain_bootstrap():
    labels, patients, scores = _draw(0, 1)
    group = bootstrap_group(labels, scores, patients, ("auroc", "recall"), thresholds=[0.4], num_resamples=200)
    assert group["auroc"].interval == bootstrap_interval(labels, scores[0], patients, num_resamples=200)
    assert group["recall"].interval.estimate == pytest.approx(np.mean(scores[0][labels == 1] >= 0.4))
    assert math.isnan(group["auroc"].sd) and group["auroc"].seed_part == []


def test_several_runs_are_combined_as_seeds():
    labels, patients, scores = _draw(1, 3)
    group = bootstrap_group(labels, scores, patients, ("auroc",), num_resamples=200)["auroc"]
    samples = sample_auroc(labels, scores, patients, num_resamples=200)
    expected = combine(samples, kind="area")
    assert group.values == pytest.approx(samples.estimates)
    assert group.sd == pytest.approx(samples.estimates.std(ddof=1))
    assert (group.interval.low, group.interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("num_positives", [10, 20])
def test_two_runs_cover_an_area_near_one(num_positives):
    """Two runs with the same scores add no variance between seeds: a second run must not make the interval shorter."""
    rng, covered, area = np.random.default_rng(num_positives), 0, 0.977
    labels = np.r_[np.ones(num_positives, int), np.zeros(100, int)]
    distance = math.sqrt(2) * stats.norm.ppf(area)
    for seed in range(150):
        scores = special.expit(distance * labels + rng.normal(size=len(labels)))
        options = {"num_resamples": 150, "seed": seed}
        found = bootstrap_group(labels, [scores, scores], None, ("auroc",), **options)["auroc"].interval
        covered += found.low <= area <= found.high
    assert covered >= 0.92 * 150


def test_a_count_of_several_runs_that_never_varied_has_a_width():
    runs = [{"a": np.zeros(24)}] * 2
    one, two = (
        bootstrap_group_means(some, np.arange(24), {"a": "count"}, num_resamples=50) for some in (runs[:1], runs)
    )
    assert one["a"].high == two["a"].high == pytest.approx(0.142, abs=1e-3)


@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.1, 1.0])
def test_a_difference_that_never_varied_has_a_width(gain):
    """Of 24 patients none shows the 14 % that Clopper and Pearson allow, in which any difference may be."""
    runs, room = [{"a": np.full(24, gain)}] * 2, 1 - 0.025 ** (1 / 24)
    for some in (runs[:1], runs):
        found = bootstrap_group_means(some, np.arange(24), {"a": "difference"}, num_resamples=50)["a"]
        ends = ((1 - room) * gain - room, (1 - room) * gain + room)
        assert (found.low, found.high) == pytest.approx(ends) and found.estimate == pytest.approx(gain)
        assert -1 <= found.low < found.high <= 1
    one = sample_means(np.full((2, 24), gain), np.arange(24), num_resamples=50)
    none = sample_means(np.zeros((2, 24)), np.arange(24), num_resamples=50)
    paired = compare(one, none, bounds=(-1.0, 1.0))
    assert (paired.low, paired.high) == pytest.approx(ends)


def test_too_few_patients_are_not_compared():
    labels = np.r_[np.ones(4, int), np.zeros(30, int)]
    scores = np.random.default_rng(1).random((2, 34))
    groups = [bootstrap_group(labels, [run], None, ("auroc",), num_resamples=50)["auroc"] for run in scores]
    for test in (compare_groups(*groups), paired_bootstrap(labels, *scores, None, num_resamples=50)):
        assert math.isnan(test.difference.low) and math.isnan(test.p_value) and math.isfinite(test.difference.estimate)


def test_a_calibration_error_reaches_down_by_its_bias_of_one_run_and_of_several():
    labels, patients, scores = _draw(2, 3)
    one, three = (
        bootstrap_group(labels, runs, patients, ("calibration_error",), num_resamples=200)["calibration_error"].interval
        for runs in (scores[:1], scores)
    )
    assert one == bootstrap_interval(labels, scores[0], patients, "calibration_error", num_resamples=200)
    biases = [bound_calibration_bias(labels, run, patients) for run in scores]
    assert one.low < one.estimate - biases[0] and three.low < three.estimate - np.mean(biases)


def test_a_statistic_undefined_in_one_run_is_undefined_without_a_warning():
    labels, patients, (scores, _) = _draw(6, 2)
    group = bootstrap_group(labels, [scores, scores * 0.1], patients, ("precision", "auroc"), num_resamples=50)
    assert math.isnan(group["precision"].interval.estimate) and math.isnan(group["precision"].interval.low)
    assert group["auroc"].interval.low < group["auroc"].interval.estimate  # the second run ranks alike


def test_two_seeds_that_disagree_show_no_difference():
    """The sd of two runs has one degree of freedom: t is 12.7, and 1.96 would call this a finding."""
    labels, patients, _ = _draw(7, 1)
    rng = np.random.default_rng(8)
    good, bad = ([1 / (1 + np.exp(-rng.normal(s * labels))) for s in pair] for pair in ((2.5, 2.5), (0.9, 0.2)))
    a, b = (bootstrap_group(labels, runs, patients, ("auroc",), num_resamples=200)["auroc"] for runs in (good, bad))
    test = compare_groups(a, b)
    assert test.difference.estimate > 1.96 * test.standard_error
    assert test.difference.low < 0 < test.difference.high and test.p_value > 0.05


def test_means_of_images_are_combined_as_seeds_and_one_run_is_plain():
    rng = np.random.default_rng(9)
    values, patients = rng.random((3, 80)), np.arange(80) // 2
    values[:, rng.random(80) < 0.2] = np.nan
    runs = [{"iou": row, "twice": 2 * row} for row in values]
    kinds = {"iou": "share", "twice": "ratio"}
    several = bootstrap_group_means(runs, patients, kinds, num_resamples=60)
    samples = sample_means(values, patients, num_resamples=60)
    expected, plain = combine(samples, bounds=(0.0, 1.0), kind="share"), combine(samples)
    assert (several["iou"].low, several["iou"].high) == pytest.approx((expected.low, expected.high))
    assert several["twice"].estimate == pytest.approx(2 * expected.estimate)
    assert (several["twice"].low, several["twice"].high) == pytest.approx((2 * plain.low, 2 * plain.high))
    nothing = bootstrap_group_means([{"iou": []}, {"iou": []}], [], {"iou": "share"}, num_resamples=60)
    assert math.isnan(nothing["iou"].estimate)  # such as no predicted positive in any run
    one = bootstrap_group_means(runs[:1], patients, {"iou": "ratio", "twice": "ratio"}, num_resamples=60)
    assert one == bootstrap_means(runs[0], patients, num_resamples=60)
    difference = bootstrap_group_means(runs[:1], patients, {"iou": "difference"}, num_resamples=60)["iou"]
    assert difference == one["iou"]


def test_each_run_has_its_own_threshold():
    labels, patients, scores = _draw(2, 2)
    options = {"thresholds": [0.3, 0.7], "num_resamples": 5}
    group = bootstrap_group(labels, scores, patients, ("recall",), **options)["recall"]
    expected = [np.mean(run[labels == 1] >= threshold) for run, threshold in zip(scores, (0.3, 0.7), strict=True)]
    assert group.values == pytest.approx(expected)


def test_single_runs_compare_as_the_paired_bootstrap_and_delong():
    labels, patients, (a, b) = _draw(3, 2)
    groups = [bootstrap_group(labels, [run], patients, ("auroc",), num_resamples=300)["auroc"] for run in (a, b)]
    test, expected = (
        compare_groups(*groups),
        paired_bootstrap(labels, a, b, patients, num_resamples=300),
    )
    assert test.p_value == pytest.approx(expected.p_value)
    assert (test.difference.low, test.difference.high) == pytest.approx(
        (expected.difference.low, expected.difference.high)
    )
    assert compute_group_delong(labels, [a], [b]) == compute_delong_test(labels, a, b)


def test_a_model_against_itself_differs_by_nothing_and_seeds_widen_a_difference():
    labels, patients, scores = _draw(4, 4)
    one, other = (
        bootstrap_group(labels, runs, patients, ("auroc",), num_resamples=300)["auroc"]
        for runs in (scores[:2], scores[2:])
    )
    same = compare_groups(one, one)
    assert same.difference.estimate == 0 and same.p_value == 1
    test = compare_groups(one, other)
    seeds = one.sd**2 / 2 + other.sd**2 / 2
    assert test.standard_error**2 == pytest.approx(np.var(one.samples - other.samples) + seeds)
    assert test.difference.low < test.difference.estimate < test.difference.high
