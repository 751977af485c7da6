"""What the paper prints (Tables 4 and 5), the intervals that belong to it, and whether a value of ours is inside.

The paper prints no interval. AUROC: Hanley and McNeil (1982) on its stated test set, which gives .877-.903 for .89.
Precision, recall, F1 and accuracy: binomial draws at the printed recalls on a 1:4 subsample of that test set, which is
what Table 4 implies (`cxa_jax.prevalence`); half a unit of the last printed digit is added on either side.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from cxa_jax.metrics import compute_confusion_metrics
from cxa_jax.prevalence import NUM_TEST_NEGATIVES, NUM_TEST_POSITIVES, TABLE_4

HALF_UNIT = 0.005  # of two printed decimals
NUM_DRAWS = 20_000


@dataclass(frozen=True)
class AverageRow:
    """A row of Table 5: support-weighted precision, recall and F1, and AUROC."""

    precision_weighted: float
    recall_weighted: float
    f1_weighted: float
    auroc: float


TABLE_5 = {
    "ResNet50-GAP": AverageRow(0.84, 0.70, 0.73, 0.86),
    "CXA_Res50": AverageRow(0.78, 0.75, 0.76, 0.87),
    "InceptionRes2-GAP": AverageRow(0.84, 0.81, 0.82, 0.86),
    "CXA_IncepRes2": AverageRow(0.85, 0.85, 0.85, 0.85),
    "DenseNet201-GAP": AverageRow(0.83, 0.66, 0.69, 0.84),
    "CXA_Dense201": AverageRow(0.82, 0.81, 0.81, 0.86),
    "DenseNet121-GAP": AverageRow(0.84, 0.68, 0.71, 0.85),
    "CXA_Dense121": AverageRow(0.87, 0.85, 0.86, 0.89),
}


def compute_hanley_mcneil_interval(
    auroc: float, num_positives: int, num_negatives: int, level: float = 0.95
) -> tuple[float, float]:
    """Compute AUROC +- z se, se^2 = (A(1 - A) + (n+ - 1)(Q1 - A^2) + (n- - 1)(Q2 - A^2)) / (n+ n-).

    Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A): all that a printed AUROC and two counts allow.
    """
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (num_positives - 1) * (q1 - auroc**2) + (num_negatives - 1) * (q2 - auroc**2)
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(spread / (num_positives * num_negatives))
    return auroc - half, auroc + half


@cache
def find_paper_intervals(model: str) -> dict[str, tuple[float, float, float]]:
    """Return metric -> (printed value, low, high) of a model; empty for a model the paper does not have.

    For GAP models the paper prints averages alone: no interval follows from them, so low and high are nan.
    """
    if model not in TABLE_5:
        return {}
    averages = TABLE_5[model]
    low, high = compute_hanley_mcneil_interval(averages.auroc, NUM_TEST_POSITIVES, NUM_TEST_NEGATIVES)
    intervals = {"auroc": (averages.auroc, low, high)}
    for name in ("precision_weighted", "recall_weighted", "f1_weighted"):
        intervals[name] = (getattr(averages, name), math.nan, math.nan)
    if model not in TABLE_4:
        return intervals
    row, rng = TABLE_4[model], np.random.default_rng(0)
    tp = rng.binomial(NUM_TEST_POSITIVES, row.positive[1], NUM_DRAWS)
    tn = rng.binomial(4 * NUM_TEST_POSITIVES, row.negative[1], NUM_DRAWS)
    counts = np.stack([tn, 4 * NUM_TEST_POSITIVES - tn, NUM_TEST_POSITIVES - tp, tp], axis=-1).reshape(-1, 2, 2)
    draws = compute_confusion_metrics(counts)
    printed = {"accuracy": row.accuracy}
    for suffix, triple in (("_negative", row.negative), ("", row.positive), ("_weighted", row.weighted)):
        printed |= {f"{name}{suffix}": value for name, value in zip(("precision", "recall", "f1"), triple, strict=True)}
    for name, value in printed.items():
        low, high = np.percentile(draws[name], [2.5, 97.5])
        intervals[name] = (value, min(float(low), value) - HALF_UNIT, max(float(high), value) + HALF_UNIT)
    return intervals


def is_official_test_set(num_images: int, num_positives: int) -> bool:
    """Tell by the counts whether these can be the paper's test images: 1,069 of 10,930 positive."""
    return (num_positives, num_images - num_positives) == (NUM_TEST_POSITIVES, NUM_TEST_NEGATIVES)


def judge(value: float, low: float, high: float) -> str:
    """Say where a value of ours lies: 'inside', 'below' or 'above' the paper's interval."""
    if not (math.isfinite(value) and math.isfinite(low)):
        return "no interval"
    return "below" if value < low else "above" if value > high else "inside"
