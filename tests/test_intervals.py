"""Intervals of shares and counts: against scipy's Wilson, coverage by simulation with clusters, none and all."""

import math

import numpy as np
import pytest
from scipy import stats

from cxa_jax import intervals
from cxa_jax.seed_comparison import SeedSamples, combine
from cxa_jax.statistics import bootstrap_intervals, bootstrap_means


def draw_images(rng, num_patients: int, share: float, likeness: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw 0 or 1 for one to three images a patient; with probability `likeness` all of a patient's are alike."""
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 4, num_patients))
    alike, common = rng.random(num_patients) < likeness, rng.random(num_patients)
    return (np.where(alike[patients], common[patients], rng.random(len(patients))) < share).astype(float), patients


def test_of_many_independent_images_it_is_wilsons():
    rng = np.random.default_rng()
    values = (rng.random(4000) < 0.1).astype(float)
    found = bootstrap_means({"a": values}, None, {"a": intervals.make_share_interval}, num_resamples=4000)["a"]
    expected = stats.binomtest(int(values.sum()), 4000).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02)


def measure_coverage(num_simulations: int, num_patients: int, share: float, likeness: float, maker) -> float:
    rng, covered = np.random.default_rng([num_patients, int(1000 * share)]), 0
    for _ in range(num_simulations):
        values, patients = draw_images(rng, num_patients, share, likeness)
        found = bootstrap_means({"a": values}, patients, {"a": maker}, num_resamples=200, seed=rng)["a"]
        covered += found.low <= share <= found.high
    return covered / num_simulations


@pytest.mark.parametrize(("num_patients", "share"), [(15, 0.95), (40, 0.95), (40, 0.3), (69, 0.98)])
def test_a_share_is_covered_where_percentiles_do_not(num_patients, share):
    assert 0.92 <= measure_coverage(300, num_patients, share, 0.5, intervals.make_share_interval) <= 0.99
    if share > 0.9:
        assert measure_coverage(100, num_patients, share, 0.5, intervals.make_interval) < 0.92


@pytest.mark.slow
@pytest.mark.parametrize("likeness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_patients", [15, 40, 69, 128])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.2, 0.5, 0.8, 0.95])
def test_coverage_of_shares(num_patients, share, likeness):
    coverage = measure_coverage(1000, num_patients, share, likeness, intervals.make_share_interval)
    assert 0.92 - 0.015 <= coverage <= 0.98 + 0.01, coverage  # .92 to .98, and two standard errors of 1,000


def measure_coverage_of_seeds(num_simulations: int, num_patients: int, share: float) -> float:
    """Three seeds whose true shares differ (.3 on the logit scale), on the same images."""
    rng = np.random.default_rng(num_patients)
    draw = lambda size: 1 / (1 + np.exp(-(np.log(share / (1 - share)) + 0.3 * rng.normal(size=size))))  # noqa: E731
    truth, covered = draw(100_000).mean(), 0
    for _ in range(num_simulations):
        patients = np.repeat(np.arange(num_patients), rng.integers(1, 4, num_patients))
        common = rng.random(num_patients)[patients]
        rows = np.stack([common < seed_share for seed_share in draw(3)]).astype(float)
        weights = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), 200)[:, patients]
        resampled = rows @ weights.T / weights.sum(1)
        found = combine(SeedSamples(rows.mean(1), resampled, num_patients), bounds=(0.0, 1.0), kind="share")
        covered += found.low <= truth <= found.high
    return covered / num_simulations


@pytest.mark.parametrize(("num_patients", "share"), [(15, 0.95), (69, 0.9), (69, 0.5)])
def test_a_share_of_several_seeds_is_covered(num_patients, share):
    assert 0.92 <= measure_coverage_of_seeds(300, num_patients, share) <= 1


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("num_runs", [1, 2])
def test_none_or_all_of_few_patients_has_a_width(outcome, num_runs):
    values, patients = np.full(24, outcome), np.arange(24) // 2
    if num_runs == 1:
        found = bootstrap_means({"a": values}, patients, {"a": intervals.make_share_interval}, num_resamples=20)["a"]
    else:
        samples = SeedSamples(np.full(num_runs, outcome), np.full((num_runs, 20), outcome), 12)
        found = combine(samples, bounds=(0.0, 1.0), kind="share")
    assert found.estimate == outcome
    width = found.high - found.low
    assert 0.15 < width < 0.36 and outcome in (found.low, found.high)  # Clopper and Pearson of 12: .265


def test_a_count_that_never_varied_may_be_another():
    patients = np.arange(24) // 2
    options = {"num_resamples": 50}
    makers = dict.fromkeys(("none", "one", "some"), intervals.make_count_interval)
    columns = {"none": np.zeros(24), "one": np.ones(24), "some": np.arange(24) % 3}
    found = bootstrap_means(columns, patients, makers, **options)
    assert (found["none"].low, found["none"].high) == (0, pytest.approx(0.265, abs=1e-3))
    assert found["one"].low == pytest.approx(2 - found["one"].high) and found["one"].low == pytest.approx(
        0.735, abs=1e-3
    )
    assert found["some"] == bootstrap_means(columns, patients, **options)["some"]


def test_what_is_undefined_stays_undefined():
    values = np.full(6, np.nan)
    for maker in (intervals.make_share_interval, intervals.make_count_interval):
        found = bootstrap_means({"a": values}, None, {"a": maker}, num_resamples=10)["a"]
        assert math.isnan(found.estimate) and math.isnan(found.low) and math.isnan(found.high)


def test_the_width_rests_on_the_patients_that_define_a_value():
    """Eight of ten patients have none: two found of two are less than ten of ten."""
    values = np.array([1.0, 1.0] + [np.nan] * 8)
    maker = {"a": intervals.make_share_interval}
    two = bootstrap_means({"a": values}, np.arange(10), maker, num_resamples=50)["a"]
    ten = bootstrap_means({"a": np.ones(10)}, np.arange(10), maker, num_resamples=50)["a"]
    assert two.high == ten.high == 1 and two.low < ten.low - 0.2


def test_the_width_of_a_share_rests_on_what_it_is_a_share_of():
    """One image called positive, rightly: nothing is known of precision, much of specificity."""
    labels, scores = np.r_[np.ones(100, int), np.zeros(200, int)], np.full(300, 0.1)
    scores[0] = 0.9
    found = bootstrap_intervals(labels, scores, None, ("precision", "specificity", "recall"), num_resamples=200)
    assert found["precision"].estimate == 1 and found["precision"].low < 0.1
    assert found["specificity"].low > 0.97 and found["recall"].high < 0.06


def test_rounding_is_no_variance():
    makers = {"a": intervals.make_share_interval}
    for value in (0.5, 0.9, 1 / 3):
        found = bootstrap_means({"a": np.full(24, value)}, np.arange(24), makers, num_resamples=100)["a"]
        assert found.high - found.low > 0.2


def test_of_one_patient_nothing_is_known():
    found = bootstrap_means({"a": [1.2, 1.4]}, [0, 0], num_resamples=20)["a"]
    assert found.estimate == pytest.approx(1.3) and math.isnan(found.low) and math.isnan(found.high)


def test_an_interval_holds_its_estimate():
    rng = np.random.default_rng()
    for _ in range(200):
        num_patients, num_runs = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        rows = rng.integers(0, 2, (num_runs, num_patients)).astype(float)
        weights = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), 100)
        samples = SeedSamples(rows.mean(1), rows @ weights.T / num_patients, num_patients)
        found = combine(samples, bounds=(0.0, 1.0), kind="share")
        assert 0 <= found.low <= found.estimate <= found.high <= 1
        single = intervals.make_share_interval(rows[0].mean(), samples.resampled[0], 0.95, num_patients)
        assert 0 <= single.low <= single.estimate <= single.high <= 1
