"""Groups of runs: one run is the plain bootstrap, several add the seeds' variance, differences are paired."""

import math

import numpy as np
import pytest

from cxa_jax.comparison import compute_delong_test, paired_bootstrap
from cxa_jax.group_statistics import bootstrap_group, compare_groups, compute_group_delong
from cxa_jax.statistics import bootstrap_interval, combine_seeds


def _draw(seed: int, num_runs: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.4).astype(int)
    return labels, np.arange(200) // 2, [1 / (1 + np.exp(-rng.normal(labels))) for _ in range(num_runs)]


def test_one_run_is_the_plain_bootstrap():
    labels, patients, scores = _draw(0, 1)
    group = bootstrap_group(labels, scores, patients, ("auroc", "recall"), thresholds=[0.4], num_resamples=200)
    assert group["auroc"].interval == bootstrap_interval(labels, scores[0], patients, num_resamples=200)
    assert group["recall"].interval.estimate == pytest.approx(np.mean(scores[0][labels == 1] >= 0.4))
    assert math.isnan(group["auroc"].sd) and group["auroc"].seed_variance == 0


def test_several_runs_are_combined_as_seeds():
    labels, patients, scores = _draw(1, 3)
    group = bootstrap_group(labels, scores, patients, ("auroc",), num_resamples=200)["auroc"]
    expected = combine_seeds(labels, np.stack(scores), patients, num_resamples=200)
    assert group.values == pytest.approx(expected.values) and group.sd == pytest.approx(expected.sd)
    assert (group.interval.low, group.interval.high) == pytest.approx((expected.interval.low, expected.interval.high))


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
        compare_groups(labels, patients, *groups),
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
    same = compare_groups(labels, patients, one, one)
    assert same.difference.estimate == 0 and same.p_value == 1
    test = compare_groups(labels, patients, one, other)
    assert test.standard_error**2 == pytest.approx(
        np.var(one.samples - other.samples) + one.seed_variance + other.seed_variance
    )
    assert test.difference.low < test.difference.estimate < test.difference.high
