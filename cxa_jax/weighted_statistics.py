"""Statistics of weighted images, for many sets of weights at once: what a bootstrap or a subsample evaluates."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.errors import UserError
from cxa_jax.metrics import (
    CONFUSION_METRICS,
    NUM_CALIBRATION_BINS,
    SPECIFICITIES,
    check_labels_and_scores,
    compute_confusion_metrics,
)

SENSITIVITIES = {f"sensitivity_at_specificity_{specificity:g}": specificity for specificity in SPECIFICITIES}
RANKING_STATISTICS = ("auroc", "average_precision", *SENSITIVITIES)
STATISTICS = (*RANKING_STATISTICS, "brier_score", "calibration_error", *CONFUSION_METRICS)


def compute_weighted_statistics(
    labels: ArrayLike, scores: ArrayLike, weights: np.ndarray, statistics: Sequence[str], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """Compute statistics of weighted images, for many sets of weights at once.

    An integer weight stands for that many copies of the image. Scores are sorted once for all sets of weights.

    Args:
        labels: [N], 0 or 1.
        scores: [N].
        weights: [R, N], non-negative.
        statistics: names from `STATISTICS`.
        threshold: of the statistics that need one.

    Returns:
        name -> [R]; nan where undefined.

    Raises:
        UserError: an unknown name, a wrong shape.
    """
    labels, scores = check_labels_and_scores(labels, scores, probabilities="calibration_error" in statistics)
    if weights.ndim != 2 or weights.shape[1] != len(labels):
        raise UserError(f"weights has shape {weights.shape}; needed is [R, {len(labels)}]")
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown:
        raise UserError(f"unknown statistics {', '.join(unknown)}; known are {', '.join(STATISTICS)}")
    values: dict[str, np.ndarray] = {}
    if any(name in RANKING_STATISTICS for name in statistics):
        values |= _ranking_statistics(labels, scores, weights)
    if "brier_score" in statistics:
        values["brier_score"] = weights @ (scores - labels) ** 2 / weights.sum(1)
    if "calibration_error" in statistics:
        values["calibration_error"] = _calibration_error(labels, scores, weights)
    if any(name in CONFUSION_METRICS for name in statistics):
        values |= compute_confusion_metrics(compute_weighted_confusion(labels, scores, weights, threshold))
    return {name: values[name] for name in statistics}


def name_units(patients: ArrayLike | None, num_images: int) -> np.ndarray:
    """Return the patient of each image [N]; None takes every image for a patient of its own."""
    return np.arange(num_images) if patients is None else np.asarray(patients)


def find_denominator(statistic: str, labels: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray | None:
    """Return which images [N] a statistic is a share of; None for one that is no share of one class or decision."""
    if statistic in ("recall", "tpr", *SENSITIVITIES):
        return labels == 1
    if statistic in ("fpr", "specificity", "recall_negative"):
        return labels == 0
    if statistic == "precision":
        return scores >= threshold
    if statistic in ("npv", "precision_negative"):
        return scores < threshold
    return np.ones(len(labels), bool) if statistic in ("accuracy", "recall_weighted", "brier_score") else None


def compute_weighted_confusion(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, threshold: float
) -> np.ndarray:
    """Sum the weights [R, N] of each cell of [[TN, FP], [FN, TP]], positive where score >= threshold: [R, 2, 2]."""
    return (weights @ np.eye(4)[2 * labels + (scores >= threshold)]).reshape(-1, 2, 2)


def _ranking_statistics(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Compute what depends on the order alone from the weight of each class at each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    first_of_ties = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    ranked, positive = weights[:, order], labels[order]
    positives = np.add.reduceat(ranked * positive, first_of_ties, axis=1)
    negatives = np.add.reduceat(ranked * (1 - positive), first_of_ties, axis=1)
    tp, fp = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
    num_positives, num_negatives = tp[:, -1], fp[:, -1]
    negatives_below = num_negatives[:, None] - fp + negatives / 2  # a tie counts half
    pairs = np.einsum("rg,rg->r", positives, negatives_below)
    precision = tp / np.maximum(tp + fp, np.finfo(np.float64).tiny)  # no weight so far: 0, and no positive either
    undefined = np.full(len(weights), np.nan)
    both, some = (num_positives > 0) & (num_negatives > 0), num_positives > 0
    area = np.einsum("rg,rg->r", positives, precision)
    values = {
        "auroc": np.divide(pairs, num_positives * num_negatives, out=undefined.copy(), where=both),
        "average_precision": np.divide(area, num_positives, out=undefined.copy(), where=some),
    }
    found = np.concatenate([np.zeros((len(weights), 1)), tp], axis=1)  # the first: nothing is called positive
    for name, specificity in SENSITIVITIES.items():
        allowed = (1 - specificity + 1e-12) * num_negatives
        last = np.sum(fp <= allowed[:, None], axis=1)
        values[name] = np.divide(found[np.arange(len(found)), last], num_positives, out=undefined.copy(), where=both)
    return values


def _calibration_error(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over bins |weighted sum of (label - score)| / total, which is sum_b n_b / N |share_b - mean score_b|."""
    return np.abs(weights @ bin_gaps(labels, scores)).sum(1) / weights.sum(1)


def bin_gaps(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return label - score of each image in the column of its calibration bin, 0 in the others: [N, bins]."""
    bins = np.minimum((scores * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
    return np.eye(NUM_CALIBRATION_BINS)[bins] * (labels - scores)[:, None]
