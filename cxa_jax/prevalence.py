"""What the share of positives does to precision, F1, accuracy and NPV; and what the paper's tables imply about it.

TPR, FPR and AUROC do not depend on the prevalence, the other metrics do: numbers of two papers compare at one
prevalence only. Table 4 implies 19-20.5 % positives, the stated test set has 9.8 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.errors import UserError
from cxa_jax.intervals import Interval
from cxa_jax.metrics import check_labels_and_scores, compute_confusion_metrics
from cxa_jax.statistics import compute_weighted_statistics

NUM_TEST_NEGATIVES = 9861  # of the official test list, 2020 label file
NUM_TEST_POSITIVES = 1069
PAPER_LIKE_STATISTICS = (
    "auroc", "average_precision", "accuracy", "precision", "recall", "f1", "fpr", "specificity", "npv",
    "precision_negative", "recall_negative", "f1_negative", "precision_weighted", "recall_weighted", "f1_weighted",
)  # fmt: skip


@dataclass(frozen=True)
class PrintedRow:
    """A row of Table 4 as printed: (precision, recall, F1) by class and weighted, and accuracy."""

    negative: tuple[float, float, float]
    positive: tuple[float, float, float]
    weighted: tuple[float, float, float]
    accuracy: float


TABLE_4 = {
    "CXA_Res50": PrintedRow((0.88, 0.80, 0.84), (0.41, 0.57, 0.48), (0.78, 0.75, 0.76), 0.75),
    "CXA_IncepRes2": PrintedRow((0.90, 0.91, 0.91), (0.61, 0.59, 0.60), (0.85, 0.85, 0.85), 0.8475),
    "CXA_Dense201": PrintedRow((0.89, 0.86, 0.88), (0.52, 0.59, 0.55), (0.82, 0.81, 0.81), 0.8058),
    "CXA_Dense121": PrintedRow((0.93, 0.88, 0.90), (0.59, 0.73, 0.66), (0.87, 0.85, 0.86), 0.85),
}


def compute_metrics_at_prevalence(confusion: ArrayLike, prevalence: float) -> dict[str, float]:
    """Compute the confusion metrics as if a share `prevalence` of the images were positive.

    Each class is re-weighted as a whole, TPR and FPR stay: precision = pi TPR / (pi TPR + (1 - pi) FPR), and so on.

    Args:
        confusion: counts [[TN, FP], [FN, TP]].
        prevalence: pi, in (0, 1).

    Returns:
        As `compute_confusion_metrics`, floats; all nan where a class has no images.

    Raises:
        UserError: prevalence outside (0, 1).
    """
    confusion = np.asarray(confusion, np.float64)
    if not confusion.sum(1).all():
        return dict.fromkeys(compute_confusion_metrics(confusion), float("nan"))
    shares = reweight_confusion(confusion, prevalence)
    return {name: float(value) for name, value in compute_confusion_metrics(shares).items()}


def reweight_confusion(confusion: ArrayLike, prevalence: float) -> np.ndarray:
    """Turn counts [..., 2, 2] into shares at another prevalence; a class without images gives shares of 0.

    Raises:
        UserError: prevalence outside (0, 1).
    """
    if not 0 < prevalence < 1:
        raise UserError(f"prevalence is {prevalence}; needed is a share between 0 and 1, such as 0.0978")
    confusion = np.asarray(confusion, np.float64)
    support = confusion.sum(-1, keepdims=True)
    rates = np.divide(confusion, support, out=np.zeros_like(confusion), where=support > 0)
    return rates * np.array([[1 - prevalence], [prevalence]])


def bound_by_rates(
    metric: str, interval: Interval, recall: Sequence[float], specificity: Sequence[float], prevalence: float
) -> Interval:
    """Return the interval of a metric at another prevalence, bounded by what recall and specificity may be.

    Precision and NPV hang on the ratio of two shares of different patients, TPR / FPR and TNR / FNR, of which one is
    near 0: theirs is Donner and Zou's (2012), by the variances recovered from the two shares' own intervals (MOVER).
    No resample shows what no false positive of few images leaves open, and re-weighting magnifies it. Others keep
    their percentiles; those of 0 or 1 take the metric at both rates' lower, or upper, ends.

    Args:
        metric: of `compute_confusion_metrics`.
        interval: percentiles over resamples.
        recall: (estimate, low, high).
        specificity: the same.
        prevalence: pi, in (0, 1).
    """
    if not np.isfinite([interval.estimate, *recall, *specificity]).all():
        return interval
    others = {"precision": (recall, specificity, prevalence), "npv": (specificity, recall, 1 - prevalence)}
    others["precision_negative"] = others["npv"]
    if metric in others:
        found, excluded, share = others[metric]
        missed = 1 - excluded[0], 1 - excluded[2], 1 - excluded[1]  # FPR, or FNR: estimate, low, high
        ends = _bound_ratio(found, missed)
        low, high = (1.0 if np.isinf(end) else share * end / (share * end + 1 - share) for end in ends)
    elif interval.estimate in (0.0, 1.0):
        low, high = (
            compute_metrics_at_prevalence([[tnr, 1 - tnr], [1 - tpr, tpr]], prevalence)[metric]
            for tpr, tnr in (recall[1:2] + specificity[1:2], recall[2:3] + specificity[2:3])
        )
    else:
        return interval
    return replace(interval, low=min(low, interval.estimate), high=max(high, interval.estimate))


def _bound_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a / b from (estimate, low, high) of either, a and b independent and not negative."""
    (a, a_low, a_high), (b, b_low, b_high) = a, b
    if a == b == 0:
        return 0.0, float("inf")
    # Donner and Zou's lower end with its numerator made rational, which holds where b or the denominator is 0.
    least, most = a_low * (2 * a - a_low), a_high * (2 * a - a_high)
    below, above = b_high * (2 * b - b_high), b_low * (2 * b - b_low)
    root = max((a * b) ** 2 - least * below, 0.0) ** 0.5
    low = least / (a * b + root) if least > 0 else 0.0
    high = (a * b + max((a * b) ** 2 - most * above, 0.0) ** 0.5) / above if above > 0 else float("inf")
    return low, high


def compute_paper_like_metrics(
    labels: ArrayLike,
    scores: ArrayLike,
    threshold: float = 0.5,
    *,
    num_subsamples: int = 200,
    negatives_per_positive: int = 4,
    seed: int | np.random.Generator = 0,
) -> dict[str, Any]:
    """Compute metrics over random subsamples with a fixed number of negatives for each positive.

    All positives are kept and negatives drawn without replacement; where negatives are too few, all of them are kept
    and positives drawn. Mark the result "paper-like" wherever it is printed: it is not the test set's prevalence.

    Args:
        labels: [N], 0 or 1.
        scores: [N], probabilities.
        threshold: score from which an image is called positive.
        num_subsamples: of the draws.
        negatives_per_positive: 4 gives 20 % positives.

    Returns:
        name -> {'mean', 'sd', 'low', 'high'} over the subsamples (2.5 and 97.5 percentiles), and `num_positives`,
        `num_negatives`, `num_subsamples`. The spread is that of the draw alone, not an interval for new patients.

    Raises:
        UserError: a class without images, or fewer negatives than `negatives_per_positive`.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    negatives, positives = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    num_positives = min(len(positives), len(negatives) // negatives_per_positive)
    if not num_positives:
        raise UserError(
            f"a 1:{negatives_per_positive} subsample needs one positive and {negatives_per_positive} negatives; "
            f"there are {len(positives)} and {len(negatives)}"
        )
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_subsamples, len(labels)))
    for row in weights:
        row[rng.choice(positives, num_positives, replace=False)] = 1
        row[rng.choice(negatives, num_positives * negatives_per_positive, replace=False)] = 1
    samples = compute_weighted_statistics(labels, scores, weights, PAPER_LIKE_STATISTICS, threshold)
    summary: dict[str, Any] = {name: _summarize(values) for name, values in samples.items()}
    return summary | {
        "num_positives": num_positives,
        "num_negatives": num_positives * negatives_per_positive,
        "num_subsamples": num_subsamples,
    }


def _summarize(values: np.ndarray) -> dict[str, float]:
    if not np.isfinite(values).all():  # undefined in one draw, hence undefined
        return dict.fromkeys(("mean", "sd", "low", "high"), float("nan"))
    low, high = np.percentile(values, [2.5, 97.5])
    return {"mean": float(values.mean()), "sd": float(values.std()), "low": float(low), "high": float(high)}


def find_feasible_confusion_matrices(
    row: PrintedRow,
    num_negatives: int = NUM_TEST_NEGATIVES,
    num_positives: int = NUM_TEST_POSITIVES,
    *,
    decimals: int = 2,
    check_weighted: bool = False,
) -> np.ndarray:
    """Find all integer confusion matrices whose rounded metrics are the printed ones.

    Exhaustive: recall confines TN and TP to short ranges, of which every pair is tried. A value that lies on a
    rounding boundary counts for both neighbours.

    Args:
        row: printed values; precision, recall and F1 of both classes are compared.
        num_negatives: images of class 0.
        num_positives: images of class 1.
        decimals: of the printed values.
        check_weighted: compare the weighted averages as well.

    Returns:
        int64 [M, 2, 2] matrices [[TN, FP], [FN, TP]]; M = 0 means that the row cannot come from such a test set.
    """
    half_unit = 0.5 * 10.0**-decimals + 1e-9
    tn = _counts_with_share(row.negative[1], num_negatives, half_unit)[:, None]
    tp = _counts_with_share(row.positive[1], num_positives, half_unit)[None, :]
    tn, tp = np.broadcast_arrays(tn, tp)
    matrices = np.stack([tn, num_negatives - tn, num_positives - tp, tp], axis=-1).reshape(-1, 2, 2)
    values = compute_confusion_metrics(matrices)
    printed = {"_negative": row.negative, "": row.positive}
    if check_weighted:
        printed["_weighted"] = row.weighted
    fits = np.ones(len(matrices), bool)
    for suffix, triple in printed.items():
        for name, value in zip(("precision", "recall", "f1"), triple, strict=True):
            fits &= np.abs(values[name + suffix] - value) <= half_unit
    return matrices[fits]


def _counts_with_share(share: float, total: int, half_unit: float) -> np.ndarray:
    counts = np.arange(total + 1)
    return counts[np.abs(counts / total - share) <= half_unit]


def compute_implied_prevalence(precision: float, recall: float, fpr: float) -> float:
    """Compute the share of positives at which recall and fpr give this precision.

    pi = P FPR / (P FPR + (1 - P) TPR). From Table 4: .19 to .205 instead of the stated .098.
    """
    denominator = precision * fpr + (1 - precision) * recall
    return precision * fpr / denominator if denominator > 0 else float("nan")
