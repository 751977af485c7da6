"""Bootstrap, paired tests and seeds: slow twins, calibration by simulation, determinism, speed."""

import math
import time

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from cxa_jax import metrics, statistics
from cxa_jax.errors import UserError
from cxa_jax.intervals import bootstrap_p_value, make_interval
from cxa_jax.weighted_statistics import STATISTICS, compute_weighted_statistics


def _draw_clusters(
    rng: np.random.Generator, num_patients: int = 120, effect: float = 1.0, separation: float = 1.2
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Draw patients with 1-5 images, one label and one common shift each: (labels, scores, patients, true AUROC)."""
    sizes = rng.integers(1, 6, num_patients)
    patients = np.repeat(np.arange(num_patients), sizes)
    label_of_patient = (np.arange(num_patients) % 3 == 0).astype(int)
    labels = label_of_patient[patients]
    scores = separation * labels + effect * rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients))
    return labels, scores, patients, stats.norm.cdf(separation / math.sqrt(2 * (1 + effect**2)))


def _images_drawn(weights: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(weights)), weights.astype(int))


def test_resamples_draw_whole_patients_as_many_as_there_are():
    patients = np.array(["b", "a", "b", "c", "a", "a"])
    weights = np.concatenate(list(statistics.resample_patients(patients, 6, 4000, 5)))
    assert weights.shape == (4000, 6)
    assert np.array_equal(weights[:, 0], weights[:, 2]) and np.array_equal(weights[:, 1], weights[:, 5])
    assert np.all(weights[:, 0] + weights[:, 1] + weights[:, 3] == 3)
    assert weights.mean(0) == pytest.approx(1, abs=0.06)


def test_resamples_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch):
    patients = np.arange(50) // 2
    whole = np.concatenate(list(statistics.resample_patients(patients, 50, 37, 1)))
    monkeypatch.setattr(statistics, "MAX_CELLS", 50 * 8)
    chunks = list(statistics.resample_patients(patients, 50, 37, 1))
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 8, 5]
    assert np.array_equal(np.concatenate(chunks), whole)


def test_weights_are_copies_of_images():
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 2, 80)
    scores = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)  # many ties
    weights = rng.integers(0, 4, (6, 80)).astype(float)
    values = compute_weighted_statistics(labels, scores, weights, STATISTICS, 0.5)
    for row, weight in enumerate(weights):
        copies = _images_drawn(weight)
        label, score, predicted = labels[copies], scores[copies], scores[copies] >= 0.5
        expected = {
            "auroc": sklearn_metrics.roc_auc_score(label, score),
            "average_precision": sklearn_metrics.average_precision_score(label, score),
            "brier_score": np.mean((label - score) ** 2),
            "precision": sklearn_metrics.precision_score(label, predicted),
            "f1_weighted": sklearn_metrics.f1_score(label, predicted, average="weighted"),
            "specificity": np.mean(~predicted[label == 0]),
            "sensitivity_at_specificity_0.8": metrics.compute_sensitivity_at_specificity(label, score, 0.8),
            "sensitivity_at_specificity_0.95": metrics.compute_sensitivity_at_specificity(label, score, 0.95),
            "calibration_error": metrics.compute_calibration_error(label, score),
        }
        for name, value in expected.items():
            assert values[name][row] == pytest.approx(value, abs=1e-12), name


def test_a_resample_of_one_class_is_undefined_and_left_out():
    weights = np.array([[1.0, 1, 0], [0, 0, 1], [1, 1, 1]])
    values = compute_weighted_statistics([0, 0, 1], [0.1, 0.6, 0.4], weights, ("auroc", "average_precision"))
    assert np.isnan(values["auroc"][:2]).all() and values["auroc"][2] == 0.5
    assert np.isnan(values["average_precision"][0]) and values["average_precision"][1] == 1
    interval = statistics.bootstrap_interval([0, 0, 1], [0.1, 0.6, 0.4], None, num_resamples=300)
    assert 0 < interval.num_undefined < 300 and interval.estimate == 0.5 and interval.low <= 0.5 <= interval.high
    nothing = statistics.bootstrap_interval([1, 1], [0.1, 0.6], None, num_resamples=20)
    assert math.isnan(nothing.estimate) and math.isnan(nothing.low) and nothing.num_undefined == 20


def test_the_interval_equals_a_loop_over_resampled_patients():
    labels, scores, patients, _ = _draw_clusters(np.random.default_rng(2), 40)
    interval = statistics.bootstrap_interval(labels, scores, patients, "average_precision", num_resamples=150, seed=4)
    weights = np.concatenate(list(statistics.resample_patients(patients, len(labels), 150, 4)))
    drawn = [_images_drawn(weight) for weight in weights]
    loop = [sklearn_metrics.average_precision_score(labels[copies], scores[copies]) for copies in drawn]
    n = 14  # every third of 40 patients is positive; Hesterberg's tails
    tail = 100 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    assert tail < 2.5
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(loop, [tail, 100 - tail])), abs=1e-12)
    assert interval.estimate == pytest.approx(sklearn_metrics.average_precision_score(labels, scores), abs=1e-12)
    options = {"num_resamples": 150, "seed": np.random.default_rng(4)}
    assert statistics.bootstrap_interval(labels, scores, patients, "average_precision", **options) == interval
    loop = [sklearn_metrics.roc_auc_score(labels[copies], scores[copies]) for copies in drawn]
    area = sklearn_metrics.roc_auc_score(labels, scores)
    half = stats.t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1)) * np.std(loop, ddof=1) / (area * (1 - area))
    interval = statistics.bootstrap_interval(labels, scores, patients, num_resamples=150, seed=4)
    ends = special.expit(special.logit(area) + np.array([-half, half]))
    assert (interval.low, interval.high) == pytest.approx(tuple(ends), abs=1e-12)


def _coverage(num_simulations: int, num_resamples: int, clustered: bool, seed: int, **patients_of) -> float:
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(num_simulations):
        labels, scores, patients, truth = _draw_clusters(rng, **patients_of)
        interval = statistics.bootstrap_interval(
            labels, scores, patients if clustered else None, num_resamples=num_resamples, seed=rng
        )
        covered += interval.low <= truth <= interval.high
    return covered / num_simulations


def test_coverage_of_the_clustered_interval_is_nominal_and_of_the_naive_one_is_not():
    assert 0.92 <= _coverage(300, 200, clustered=True, seed=1) <= 0.98
    assert _coverage(100, 200, clustered=False, seed=1) < 0.9


def test_coverage_with_few_patients_and_an_area_near_one():
    """30 patients, 10 of them positive, true AUROC .977: percentiles cover 85 %."""
    assert 0.92 <= _coverage(300, 150, clustered=True, seed=3, num_patients=30, separation=4.0) <= 0.99


@pytest.mark.parametrize("num_patients", [10, 40])
def test_no_error_among_few_patients_is_no_proof(num_patients):
    """If one in twenty were missed, all of ten would be found in .6 of the tests: the interval must hold .95."""
    labels = np.arange(2 * num_patients) % 2
    names = ("auroc", "recall", "specificity", "npv", "average_precision")
    intervals = statistics.bootstrap_intervals(labels, labels * 0.5 + 0.25, None, names, num_resamples=50)
    for name, interval in intervals.items():
        assert interval.estimate == interval.high == 1
        if name in ("auroc", "average_precision"):  # no shares
            assert interval.low == pytest.approx(stats.binomtest(num_patients, num_patients).proportion_ci(0.95).low)
        assert interval.low < 0.95
    none = statistics.bootstrap_interval(labels, 0.1 * labels, None, "recall", num_resamples=50)
    assert (none.low, none.high) == (0, pytest.approx(1 - intervals["recall"].low))


def test_a_p_value_says_what_its_interval_says():
    rng = np.random.default_rng(12)
    for _ in range(200):
        num_patients = int(rng.integers(3, 60))
        samples = rng.normal(rng.normal(0, 2), 1, 1999)
        interval, p_value = make_both(samples, num_patients)
        if abs(p_value - 0.05) > 0.003:  # percentiles lie between two samples
            assert (p_value < 0.05) == (interval.low > 0 or interval.high < 0)


def make_both(samples, num_patients):
    return (
        make_interval(float(np.mean(samples)), samples, 0.95, num_patients),
        bootstrap_p_value(samples, num_patients),
    )


@pytest.mark.slow
def test_coverage_in_many_simulations():
    """40 patients of the rarer class: t and logit make the interval a little wide."""
    assert 0.94 <= _coverage(2000, 600, clustered=True, seed=7) <= 0.98


def _draw_probabilities(
    rng: np.random.Generator, num_patients: int, sharpness: float = 1.0, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw patients as above, three in ten positive, with calibrated scores; their logits are scaled and shifted."""
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 6, num_patients))
    labels = (rng.random(num_patients) < 0.3).astype(int)[patients]
    values = 2 * labels + rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients))  # variance 2
    logits = (2 * values - 2) / 2 + special.logit(0.3)
    return labels, special.expit(sharpness * logits + shift), patients


def _coverages(names: tuple[str, ...], num_simulations: int, num_patients: int, **scores: float) -> dict[str, float]:
    rng = np.random.default_rng(6)
    labels, everyone, _ = _draw_probabilities(rng, 200_000, **scores)
    truth = compute_weighted_statistics(labels, everyone, np.ones((1, len(labels))), names, 0.3)
    covered = dict.fromkeys(names, 0)
    for _ in range(num_simulations):
        drawn = _draw_probabilities(rng, num_patients, **scores)
        intervals = statistics.bootstrap_intervals(*drawn, names, threshold=0.3, num_resamples=200, seed=rng)
        for name, interval in intervals.items():
            covered[name] += interval.low <= truth[name][0] <= interval.high
    return {name: count / num_simulations for name, count in covered.items()}


@pytest.mark.parametrize("scores", [{}, {"shift": 0.5}, {"sharpness": 2.0}])
def test_coverage_of_the_calibration_error_whose_estimate_is_too_high(scores):
    """Percentiles cover a calibrated model's error in none of the simulations; this interval is too wide, if anything.

    The true error of a calibrated model is not quite 0 here: an estimate from 200,000 patients has noise too.
    """
    assert _coverages(("calibration_error",), 200, 60, **scores)["calibration_error"] >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [60, 150])
def test_coverage_of_every_statistic(num_patients):
    for name, coverage in _coverages(STATISTICS, 800, num_patients).items():
        assert 0.91 <= coverage <= (1 if name == "calibration_error" else 0.985), (name, coverage)


def test_two_thousand_resamples_of_the_whole_test_set_take_seconds():
    rng = np.random.default_rng(0)
    labels = (np.arange(10_930) < 1_069).astype(int)
    patients = rng.integers(0, 2_600, 10_930)
    start = time.process_time()  # not the wall: other work may share the machine
    interval = statistics.bootstrap_interval(labels, rng.normal(labels * 1.7), patients, num_resamples=2000)
    assert time.process_time() - start < 10
    assert 0.86 < interval.low < interval.estimate < interval.high < 0.91 and interval.high - interval.low < 0.03


def test_several_statistics_share_their_resamples_with_single_ones():
    labels, scores, patients, _ = _draw_clusters(np.random.default_rng(5), 50)
    names = ("auroc", "f1", "npv")
    together = statistics.bootstrap_intervals(labels, scores, patients, names, threshold=0.3, num_resamples=99)
    for name in names:
        alone = statistics.bootstrap_interval(labels, scores, patients, name, threshold=0.3, num_resamples=99)
        assert together[name] == alone


def test_means_leave_out_undefined_values():
    values = np.array([1.0, 3.0, np.nan, 5.0])
    intervals = statistics.bootstrap_means({"a": values, "b": np.full(4, np.nan)}, [0, 0, 1, 2], num_resamples=200)
    assert intervals["a"].estimate == 3.0 and intervals["a"].low >= 1 and intervals["a"].high <= 5
    assert math.isnan(intervals["b"].estimate)
    empty = statistics.bootstrap_means({"a": []}, [], num_resamples=5)
    assert math.isnan(empty["a"].estimate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patients": [1, 2]}, "one patient for each of 3 images"),
        ({"patients": None, "num_resamples": 0}, "num_resamples is 0"),
        ({"patients": None, "statistic": "auc"}, "unknown statistics auc; known are auroc"),
        ({"patients": None, "level": 95}, "level is 95"),
    ],
)
def test_bad_requests_are_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        statistics.bootstrap_interval([0, 1, 1], [0.1, 0.2, 0.3], **options)
