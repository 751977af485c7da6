"""Paired tests: their level and power by simulation; DeLong's variance against components counted pair by pair."""

import numpy as np
import pytest
from scipy import stats

from cxa_jax import comparison
from cxa_jax.errors import UserError


def _draw_clusters(rng: np.random.Generator, num_patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw patients with 1-5 images, one label and one common shift each: (labels, scores, patients)."""
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 6, num_patients))
    labels = (np.arange(num_patients) % 3 == 0).astype(int)[patients]
    return labels, 1.2 * labels + rng.normal(size=num_patients)[patients] + rng.normal(size=len(patients)), patients


def test_paired_difference_of_a_model_with_itself_is_zero_and_of_a_better_one_is_found():
    rng = np.random.default_rng(8)
    labels, scores, patients = _draw_clusters(rng, 200)
    same = comparison.paired_bootstrap(labels, scores, 2 * scores + 1, patients, num_resamples=200)
    assert same.p_value == 1 and same.difference.estimate == 0 and same.standard_error == 0
    worse = scores + rng.normal(0, 3, len(scores))
    test = comparison.paired_bootstrap(labels, scores, worse, patients, num_resamples=400)
    assert test.difference.low > 0 and 0 < test.p_value < 0.05
    mirrored = comparison.paired_bootstrap(labels, worse, scores, patients, num_resamples=400)
    assert mirrored.difference.estimate == -test.difference.estimate and mirrored.p_value == test.p_value


def test_paired_test_keeps_its_level_without_a_difference():
    rng = np.random.default_rng(9)
    p_values = []
    for _ in range(200):
        labels, common, patients = _draw_clusters(rng, 80)
        noisy = common + rng.normal(0, 1, (2, len(common)))
        p_values.append(comparison.paired_bootstrap(labels, *noisy, patients, num_resamples=200, seed=rng).p_value)
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.1


def _components(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    return wins.mean(1), wins.mean(0)


def _covariance_by_pairs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    pairs = [_components(row[labels == 1], row[labels == 0]) for row in scores]
    covariance = np.empty((len(scores), len(scores)))
    for a, (v10_a, v01_a) in enumerate(pairs):
        for b, (v10_b, v01_b) in enumerate(pairs):
            s10 = np.sum((v10_a - v10_a.mean()) * (v10_b - v10_b.mean())) / (len(v10_a) - 1)
            s01 = np.sum((v01_a - v01_a.mean()) * (v01_b - v01_b.mean())) / (len(v01_a) - 1)
            covariance[a, b] = s10 / len(v10_a) + s01 / len(v01_a)
    return covariance


@pytest.mark.parametrize("decimals", [1, 9])
def test_mid_ranks_give_the_structural_components(decimals: int):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 90)
    scores = np.round(labels + rng.normal(size=(3, 90)), decimals)
    auroc, covariance = comparison.compute_delong_covariance(labels, scores)
    assert covariance == pytest.approx(_covariance_by_pairs(labels, scores), abs=1e-15)
    expected = [_components(row[labels == 1], row[labels == 0])[0].mean() for row in scores]
    assert auroc == pytest.approx(expected, abs=1e-12)


def test_variance_is_that_of_repeated_samples():
    rng = np.random.default_rng(2)
    labels = (np.arange(150) < 50).astype(int)
    aurocs, variances = [], []
    for _ in range(600):
        auroc, covariance = comparison.compute_delong_covariance(labels, labels + rng.normal(size=150))
        aurocs.append(auroc[0])
        variances.append(covariance[0, 0])
    assert np.mean(variances) == pytest.approx(np.var(aurocs), rel=0.15)
    assert np.mean(aurocs) == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.01)


def test_variance_is_hanley_and_mcneils_on_their_exponential_scores():
    rng = np.random.default_rng(3)
    positives, negatives, auroc = 1_069, 9_861, 0.89
    labels = np.repeat([1, 0], [positives, negatives])
    scores = np.concatenate([rng.exponential(auroc / (1 - auroc), positives), rng.exponential(1, negatives)])
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    half_width = 1.96 * np.sqrt(variance / positives / negatives)
    assert half_width == pytest.approx(0.013, abs=5e-4)  # .877-.903, the interval of the paper's AUROC
    interval = comparison.compute_delong_interval(labels, scores)
    assert (interval.high - interval.low) / 2 == pytest.approx(half_width, rel=0.08)


def test_delong_finds_a_difference_and_only_a_difference():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    scores = labels + rng.normal(size=400)
    same = comparison.compute_delong_test(labels, scores, 3 * scores - 1)
    assert same.p_value == 1 and same.difference.estimate == 0
    worse = comparison.compute_delong_test(labels, scores, scores + rng.normal(0, 2, 400))
    assert worse.p_value < 0.01 and worse.difference.low > 0
    z = worse.difference.estimate / worse.standard_error
    assert worse.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))
    perfect = comparison.compute_delong_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])
    assert perfect.p_value == 0 and perfect.difference.estimate == 1


# DeLong et al. (1988): albumin, total protein, K-G score, benefit of surgery; 43 women with ovarian cancer.
OVARIAN_CANCER = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_delong_gives_the_published_values_of_delongs_own_data():
    """As the SAS/STAT manual prints them (PROC LOGISTIC, "Comparing Receiver Operating Characteristic Curves")."""
    albumin, protein, kg, benefit = np.array(OVARIAN_CANCER.split(), float).reshape(-1, 4).T
    auroc, covariance = comparison.compute_delong_covariance(benefit, [albumin, protein, -kg])
    assert auroc == pytest.approx([0.7366, 0.6478, 0.7258], abs=5e-5)
    assert np.sqrt(np.diag(covariance)) == pytest.approx([0.0927, 0.1000, 0.1028], abs=5e-5)
    interval = comparison.compute_delong_interval(benefit, albumin)
    assert (interval.low, interval.high) == pytest.approx((0.5549, 0.9182), abs=5e-5)
    printed = {
        "albumin": (0.0108, 0.0953, -0.1761, 0.1976, 0.9102),
        "protein": (-0.0780, 0.1046, -0.2830, 0.1271, 0.4561),
    }
    for name, scores in (("albumin", albumin), ("protein", protein)):
        test = comparison.compute_delong_test(benefit, scores, -kg)
        found = (test.difference.estimate, test.standard_error, test.difference.low, test.difference.high, test.p_value)
        assert found == pytest.approx(printed[name], abs=5e-5), name


def test_too_few_images_of_a_class_are_named():
    with pytest.raises(UserError, match="1 positives, 2 negatives"):
        comparison.compute_delong_covariance([0, 0, 1], [0.1, 0.2, 0.3])
