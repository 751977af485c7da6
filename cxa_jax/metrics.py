"""Classification metrics on (labels, scores): pure functions on the host, in float64.

A score is the probability of cardiomegaly; an image is called positive when ``score >= threshold``. A quantity
that the data do not define (AUROC of one class, precision without a predicted positive) is nan, never 0.0;
`undefined_to_none` turns it into JSON's null.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn import metrics as sklearn_metrics

from cxa_jax.errors import UserError

SPECIFICITIES = (0.8, 0.9, 0.95)
NUM_CALIBRATION_BINS = 15


def check_labels_and_scores(
    labels: ArrayLike, scores: ArrayLike, *, probabilities: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 [N] and scores as float64 [N], or name the first entry that is wrong.

    Args:
        labels: [N], 0 or 1.
        scores: [N], finite; higher means more likely positive.
        probabilities: also demand scores in [0, 1].

    Raises:
        UserError: wrong rank, different or zero lengths, another label than 0 or 1, a score that is not finite or
            (with `probabilities`) outside [0, 1].
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape or not labels.size:
        raise UserError(
            f"labels and scores must be two non-empty lists of one length; got shapes {labels.shape} and {scores.shape}"
        )
    _refuse(~np.isin(labels, (0, 1)), labels, "labels", "a label is 0 (no finding) or 1 (cardiomegaly)")
    _refuse(~np.isfinite(scores), scores, "scores", "every score must be a finite number")
    if probabilities:
        outside = (scores < 0) | (scores > 1)
        _refuse(outside, scores, "scores", "a score is a probability in [0, 1]; apply the sigmoid to logits first")
    return labels.astype(np.int64), scores


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, cure: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"{name}[{row}] is {values[row]} ({int(wrong.sum())} such of {len(values)}): {cure}")


def _has_both_classes(labels: np.ndarray) -> bool:
    return 0 < labels.sum() < len(labels)


def compute_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute the area under the ROC curve: P(s+ > s-) + P(s+ = s-) / 2.

    Args:
        labels: [N], 0 or 1.
        scores: [N], any finite monotone score (probability or logit).

    Returns:
        The area in [0, 1]; nan where one class is absent.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    return float(sklearn_metrics.roc_auc_score(labels, scores)) if _has_both_classes(labels) else math.nan


def compute_average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute sum_n (R_n - R_{n-1}) P_n over falling thresholds; nan without a positive."""
    labels, scores = check_labels_and_scores(labels, scores)
    return float(sklearn_metrics.average_precision_score(labels, scores)) if labels.any() else math.nan


def compute_roc_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the ROC curve (Fig. 6) at every distinct score.

    Returns:
        (fpr [M], tpr [M], thresholds [M]), thresholds falling and the first one infinite (nothing called positive);
        three empty arrays where one class is absent.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    if not _has_both_classes(labels):
        return np.empty(0), np.empty(0), np.empty(0)
    return sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)


def compute_youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute the threshold that maximises Youden's J = TPR - FPR; choose it on dev, never on test.

    Returns:
        One of the given scores; of several with the same J the highest, which calls the fewest images positive.
        nan where one class is absent.
    """
    fpr, tpr, thresholds = compute_roc_curve(labels, scores)
    if not len(thresholds):
        return math.nan
    youden = np.round((tpr - fpr)[1:], 12)  # rounding: equal J must tie in spite of the last bit
    return float(thresholds[1:][np.argmax(youden)])


def compute_sensitivity_at_specificity(labels: ArrayLike, scores: ArrayLike, specificity: float) -> float:
    """Compute the highest TPR among thresholds whose specificity is at least `specificity`; nan for one class."""
    fpr, tpr, _ = compute_roc_curve(labels, scores)
    return float(tpr[1 - fpr >= specificity - 1e-12].max()) if len(fpr) else math.nan


def compute_confusion_matrix(labels: ArrayLike, scores: ArrayLike, threshold: float) -> np.ndarray:
    """Count [[TN, FP], [FN, TP]] (Table 1: rows true, columns predicted), positive where score >= threshold.

    Returns:
        int64 [2, 2]. Matrices of disjoint sets of images add up.

    Raises:
        UserError: a threshold that is not a finite number, besides `check_labels_and_scores`.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    if not math.isfinite(threshold):
        raise UserError(f"threshold is {threshold}: give a finite number (dev data of one class define no threshold)")
    cells = 2 * labels + (scores >= threshold)
    return np.bincount(cells, minlength=4).reshape(2, 2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    undefined = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def compute_confusion_metrics(confusion: ArrayLike) -> dict[str, np.ndarray]:
    """Compute Eqs. (2)-(7) and their relatives from confusion matrices.

    accuracy = (TP + TN) / all, precision = TP / (TP + FP), recall = tpr = TP / (TP + FN), fpr = FP / (FP + TN),
    f1 = 2 TP / (2 TP + FP + FN), specificity = 1 - fpr, npv = TN / (TN + FN). `*_negative` swaps the classes;
    `*_weighted` averages both classes by their support (Table 4, "weighted average").

    Args:
        confusion: [..., 2, 2] non-negative counts, or weights, as [[TN, FP], [FN, TP]].

    Returns:
        Arrays [...]; nan where a denominator is 0. f1 is 0, not nan, when positives exist and none is found.
        A class without images has no share in the weighted averages.

    Raises:
        UserError: another shape, a negative or not finite count.
    """
    confusion = np.asarray(confusion, np.float64)
    if confusion.shape[-2:] != (2, 2) or not np.all(np.isfinite(confusion) & (confusion >= 0)):
        raise UserError(f"a confusion matrix has non-negative counts [[TN, FP], [FN, TP]]; got {confusion.tolist()}")
    tn, fp, fn, tp = confusion[..., 0, 0], confusion[..., 0, 1], confusion[..., 1, 0], confusion[..., 1, 1]
    values = {
        "accuracy": _ratio(tp + tn, tn + fp + fn + tp),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "tpr": _ratio(tp, tp + fn),
        "fpr": _ratio(fp, fp + tn),
        "specificity": _ratio(tn, tn + fp),
        "npv": _ratio(tn, tn + fn),
        "precision_negative": _ratio(tn, tn + fn),
        "recall_negative": _ratio(tn, tn + fp),
        "f1_negative": _ratio(2 * tn, 2 * tn + fp + fn),
    }
    negatives, positives = tn + fp, fn + tp
    for name in ("precision", "recall", "f1"):
        parts = [(positives, values[name]), (negatives, values[f"{name}_negative"])]
        total = sum(np.where(support > 0, support * value, 0.0) for support, value in parts)
        values[f"{name}_weighted"] = _ratio(total, negatives + positives)
    return values


CONFUSION_METRICS = tuple(compute_confusion_metrics(np.ones((2, 2))))


def compute_brier_score(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute mean (score - label)^2: 0 is perfect; a loss, in spite of its name in the field."""
    labels, scores = check_labels_and_scores(labels, scores, probabilities=True)
    return float(np.mean((scores - labels) ** 2))


def compute_reliability_curve(
    labels: ArrayLike, scores: ArrayLike, num_bins: int = NUM_CALIBRATION_BINS
) -> dict[str, np.ndarray]:
    """Compute the observed share of positives against the mean score, in equal-width bins of the score.

    Returns:
        `lower` [num_bins] left edges (a bin is [lower, next), the last one closed), `count` int64, `mean_score`
        and `positive_share`; the last two are nan in an empty bin.
    """
    labels, scores = check_labels_and_scores(labels, scores, probabilities=True)
    bins = np.minimum((scores * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    return {
        "lower": np.arange(num_bins) / num_bins,
        "count": count,
        "mean_score": _ratio(np.bincount(bins, scores, num_bins), count),
        "positive_share": _ratio(np.bincount(bins, labels, num_bins), count),
    }


def compute_calibration_error(labels: ArrayLike, scores: ArrayLike, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """Compute the expected calibration error: sum_b n_b / N |positive_share_b - mean_score_b| (Guo et al. 2017)."""
    curve = compute_reliability_curve(labels, scores, num_bins)
    gaps = np.abs(curve["positive_share"] - curve["mean_score"])
    return float(np.nansum(gaps * curve["count"]) / curve["count"].sum())


def compute_metrics(
    labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5, specificities: Sequence[float] = SPECIFICITIES
) -> dict[str, Any]:
    """Compute every metric of a set of images at one threshold.

    Args:
        labels: [N], 0 or 1.
        scores: [N], probabilities in [0, 1].
        threshold: score from which an image is called positive; it is part of the result.
        specificities: where the sensitivity is read off the ROC curve.

    Returns:
        Plain Python values: num_images, num_positives, prevalence, threshold, auroc, average_precision, brier_score,
        calibration_error, confusion_matrix, `sensitivity_at_specificity_*`, and all of `compute_confusion_metrics`.

    Raises:
        UserError: see `check_labels_and_scores`, `compute_confusion_matrix`.
    """
    labels, scores = check_labels_and_scores(labels, scores, probabilities=True)
    confusion = compute_confusion_matrix(labels, scores, threshold)
    values: dict[str, Any] = {
        "num_images": len(labels),
        "num_positives": int(labels.sum()),
        "prevalence": float(labels.mean()),
        "threshold": float(threshold),
        "auroc": compute_auroc(labels, scores),
        "average_precision": compute_average_precision(labels, scores),
        "brier_score": compute_brier_score(labels, scores),
        "calibration_error": compute_calibration_error(labels, scores),
        "confusion_matrix": confusion.tolist(),
    }
    for specificity in specificities:
        key = f"sensitivity_at_specificity_{specificity:g}"
        values[key] = compute_sensitivity_at_specificity(labels, scores, specificity)
    return values | {name: float(value) for name, value in compute_confusion_metrics(confusion).items()}


def undefined_to_none(tree: Any) -> Any:
    """Replace nan by None in nested dicts, lists and tuples: json writes null, not the invalid NaN."""
    if isinstance(tree, dict):
        return {key: undefined_to_none(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [undefined_to_none(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree
