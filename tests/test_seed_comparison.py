"""Means and differences over seeds: against plain formulas, and their coverage by simulation."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from cxa_jax.errors import UserError
from cxa_jax.seed_comparison import SeedSamples, combine, compare, sample_auroc, sample_means


def draw(seed, num_patients=60, num_seeds=3, shift=0.0):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), 2)
    labels = np.repeat(rng.integers(0, 2, num_patients), 2)
    own = np.repeat(rng.normal(size=num_patients), 2)
    scores = labels + own + rng.normal(scale=0.7, size=(num_seeds, len(labels))) + shift * labels
    return labels, scores, patients


def test_estimates_are_those_of_each_run():
    labels, scores, patients = draw(0)
    samples = sample_auroc(labels, scores, patients, num_resamples=50)
    np.testing.assert_allclose(samples.estimates, [roc_auc_score(labels, row) for row in scores], rtol=1e-12)
    assert samples.resampled.shape == (3, 50)
    assert samples.num_patients == min(np.bincount(labels)) // 2
    values = np.where(scores > 1, np.nan, scores)
    means = sample_means(values, patients, num_resamples=50)
    np.testing.assert_allclose(means.estimates, np.nanmean(values, axis=1), rtol=1e-12)


def test_interval_is_welch_and_satterthwaite_on_two_variances():
    rng = np.random.default_rng(1)
    samples = SeedSamples(rng.normal(size=4), rng.normal(scale=2, size=(4, 300)), num_patients=25)
    patients_part = samples.resampled.mean(0).var(ddof=1)
    seeds_part = samples.estimates.var(ddof=1) / 4
    free = (patients_part + seeds_part) ** 2 / (patients_part**2 / 24 + seeds_part**2 / 3)
    half = stats.t.ppf(0.975, free) * np.sqrt(patients_part + seeds_part)
    interval = combine(samples)
    assert interval.estimate == pytest.approx(samples.estimates.mean())
    assert interval.high - interval.estimate == pytest.approx(half)
    assert interval.estimate - interval.low == pytest.approx(half)


def test_one_seed_leaves_the_patients_alone():
    rng = np.random.default_rng(2)
    samples = SeedSamples(np.array([0.4]), rng.normal(size=(1, 300)), num_patients=20)
    half = stats.t.ppf(0.975, 19) * samples.resampled.std(ddof=1)
    assert combine(samples).high == pytest.approx(0.4 + half)


def test_a_model_against_itself_differs_by_nothing():
    labels, scores, patients = draw(3)
    samples = sample_auroc(labels, scores, patients, num_resamples=40)
    interval = compare(samples, samples)
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)


def test_pairing_cancels_what_two_models_share():
    labels, scores, patients = draw(4, num_patients=200)
    a, b = (sample_auroc(labels, scores + extra, patients, num_resamples=200) for extra in (0, 0.2 * labels))
    paired = compare(b, a)
    assert 0 < paired.low < paired.estimate == pytest.approx(b.estimates.mean() - a.estimates.mean())
    assert paired.high - paired.low < 0.5 * (combine(a).high - combine(a).low)


def test_intervals_cover_the_truth():
    """Two models of equal means, three seeds each, seeds and patients drawn anew: 95 % of intervals hold 0."""
    covered, num_trials = 0, 200
    for trial in range(num_trials):
        rng = np.random.default_rng([5, trial])
        patients = np.repeat(np.arange(40), 2)
        shared = np.repeat(rng.normal(size=40), 2)
        samples = []
        for _ in range(2):
            own = np.repeat(rng.normal(scale=0.5, size=40), 2)  # where this model is better or worse: by patient
            runs = shared + own + rng.normal(scale=0.15, size=(3, 1)) + rng.normal(scale=0.3, size=(3, 80))
            samples.append(sample_means(runs, patients, num_resamples=100, seed=trial))
        interval = compare(*samples)
        covered += interval.low <= 0 <= interval.high
    assert stats.binomtest(covered, num_trials, 0.95).pvalue > 1e-3, covered


def test_two_seeds_that_disagree_leave_no_more_doubt_than_there_can_be():
    a, b = (SeedSamples(np.array(runs), np.tile(np.array(runs)[:, None], 30), 50) for runs in ((0.2, 0.9), (0.8, 0.1)))
    assert compare(a, b).high > 1 and (compare(a, b, bounds=(-1, 1)).low, compare(a, b, bounds=(-1, 1)).high) == (-1, 1)


def test_other_seeds_cannot_be_paired():
    labels, scores, patients = draw(6)
    three, two = (sample_auroc(labels, rows, patients, num_resamples=30) for rows in (scores, scores[:2]))
    with pytest.raises(UserError, match="cannot be paired"):
        compare(three, two)
