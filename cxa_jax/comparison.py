"""Two models on the same images: patient-clustered paired bootstrap, and DeLong's variance and test by mid-ranks.

DeLong's formulas take images for independent and are given because the field reports them; where patients have
several images the bootstrap is the honest answer.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from cxa_jax.errors import UserError
from cxa_jax.intervals import Interval, bootstrap_p_value, make_interval
from cxa_jax.metrics import check_labels_and_scores
from cxa_jax.statistics import NUM_RESAMPLES, count_patients, resample_patients
from cxa_jax.weighted_statistics import compute_weighted_statistics

MIN_COMPARED = 5  # patients of each class: of fewer, 2,000 resamples do not show the tails of the interval


@dataclass(frozen=True)
class PairedTest:
    """Difference a - b with its interval, standard error and two-sided p-value of "no difference"."""

    difference: Interval
    standard_error: float
    p_value: float


def paired_bootstrap(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    patients: ArrayLike | None,
    statistic: str = "auroc",
    *,
    threshold: float = 0.5,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> PairedTest:
    """Test the difference of two models on the same images by resampling patients.

    The p-value inverts the interval (`intervals.bootstrap_p_value`) and is never 0. Of fewer than MIN_COMPARED patients
    of a class both are nan.
    """
    labels, scores_a = check_labels_and_scores(labels, scores_a)
    _, scores_b = check_labels_and_scores(labels, scores_b)

    def differences(weights: np.ndarray) -> np.ndarray:
        a = compute_weighted_statistics(labels, scores_a, weights, (statistic,), threshold)
        b = compute_weighted_statistics(labels, scores_b, weights, (statistic,), threshold)
        return a[statistic] - b[statistic]

    estimate = differences(np.ones((1, len(labels))))[0]
    chunks = resample_patients(patients, len(labels), num_resamples, seed)
    samples = np.concatenate([differences(weights) for weights in chunks])
    defined = samples[np.isfinite(samples)]
    units = count_patients(labels, patients)
    if units < MIN_COMPARED:
        return PairedTest(Interval(float(estimate), math.nan, math.nan, level), math.nan, math.nan)
    error = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    return PairedTest(make_interval(estimate, samples, level, units), error, bootstrap_p_value(samples, units))


def compute_delong_covariance(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUROCs of K models on the same images and their covariance (DeLong et al. 1988; Sun and Xu 2014).

    With m positives and n negatives, V10_i is the share of negatives below positive i, V01_j the share of positives
    above negative j (ties count half), and the covariance is cov(V10) / m + cov(V01) / n.

    Args:
        labels: [N], 0 or 1, at least two of each.
        scores: [K, N].

    Returns:
        (auroc [K], covariance [K, K]).

    Raises:
        UserError: fewer than two images of a class, besides `check_labels_and_scores`.
    """
    rows = [check_labels_and_scores(labels, row)[1] for row in np.atleast_2d(scores)]
    labels = np.asarray(labels)
    num_positives, num_negatives = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    if min(num_positives, num_negatives) < 2:
        raise UserError(
            f"DeLong's variance needs two images of each class; got {num_positives} positives, "
            f"{num_negatives} negatives"
        )
    above, below = [], []
    for row in rows:
        positives, negatives = row[labels == 1], row[labels == 0]
        ranks = stats.rankdata(np.concatenate([positives, negatives]))  # mid-ranks: ties share their mean rank
        above.append((ranks[:num_positives] - stats.rankdata(positives)) / num_negatives)
        below.append(1 - (ranks[num_positives:] - stats.rankdata(negatives)) / num_positives)
    v10, v01 = np.stack(above), np.stack(below)
    covariance = np.cov(v10) / num_positives + np.cov(v01) / num_negatives
    return v10.mean(1), np.atleast_2d(covariance)


def compute_delong_interval(labels: ArrayLike, scores: ArrayLike, level: float = 0.95) -> Interval:
    """Compute AUROC +- z sqrt(variance), cut to [0, 1]."""
    auroc, covariance = compute_delong_covariance(labels, scores)
    return _normal_interval(float(auroc[0]), math.sqrt(max(covariance[0, 0], 0.0)), level, bounds=(0.0, 1.0))


def compute_delong_test(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, level: float = 0.95) -> PairedTest:
    """Test AUROC(a) = AUROC(b) on the same images: z = difference / sqrt(var_a + var_b - 2 cov).

    Returns:
        PairedTest; p_value is 1 where both models rank all images alike.
    """
    auroc, covariance = compute_delong_covariance(labels, [scores_a, scores_b])
    difference = float(auroc[0] - auroc[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    error = math.sqrt(max(float(variance), 0.0))  # cancellation may leave -1e-19
    p_value = float(2 * stats.norm.sf(abs(difference) / error)) if error > 0 else float(difference == 0)
    return PairedTest(_normal_interval(difference, error, level, bounds=(-1.0, 1.0)), error, p_value)


def _normal_interval(estimate: float, error: float, level: float, bounds: tuple[float, float]) -> Interval:
    half = stats.norm.ppf((1 + level) / 2) * error
    return Interval(estimate, max(estimate - half, bounds[0]), min(estimate + half, bounds[1]), level)
