"""All that a table of predictions says about a classifier: numbers, intervals, and the protocol beside them.

It takes the rows of a predictions file, ours or anyone's. Whatever is chosen (threshold, calibration) is chosen on the
dev table; without one there is a threshold of 0.5 alone and no calibration.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from cxa_jax.calibration import fit_platt, fit_temperature
from cxa_jax.intervals import make_interval, make_interval_of
from cxa_jax.metrics import (
    CONFUSION_METRICS,
    compute_confusion_metrics,
    compute_metrics,
    compute_reliability_curve,
    compute_youden_threshold,
)
from cxa_jax.predictions import PredictionTable
from cxa_jax.prevalence import (
    bound_by_rates,
    compute_metrics_at_prevalence,
    compute_paper_like_metrics,
    reweight_confusion,
)
from cxa_jax.statistics import (
    NUM_RESAMPLES,
    bootstrap_intervals,
    bootstrap_means,
    count_patients,
    count_patients_of,
    resample_patients,
)
from cxa_jax.strata import MIN_PATIENTS, count_patients_by_class, find_strata
from cxa_jax.weighted_statistics import SENSITIVITIES, compute_weighted_confusion

LEVEL = 0.95
WITHOUT_PREVALENCE = ("recall", "tpr", "fpr", "specificity", "recall_negative")  # what re-weighting classes leaves
FIXED_THRESHOLD = 0.5
THRESHOLD_FREE = ("auroc", "average_precision", "brier_score", "calibration_error", *SENSITIVITIES)
PREVALENCES = (0.0327, 0.0978, 0.2)  # the official training list, the test list, and what Table 4 implies
STRATUM_METRICS = ("auroc", "recall", "specificity")
PAPER_LIKE_NEGATIVES = 4
MAX_LOGIT = 30.0  # of a score of exactly 0 or 1


def describe_classification(
    test: PredictionTable, dev: PredictionTable | None, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, **protocol
) -> dict[str, Any]:
    """Compute every number that predictions give: `describe_predictions`, and `strata` at dev's threshold.

    Args:
        test: what is evaluated.
        dev: where the second threshold and the calibration come from; None: neither is there.
        num_resamples: patient-clustered bootstrap resamples behind each interval.
        seed: of the resamples and subsamples.
        **protocol: `dev_name` and `prevalences`, as in `describe_predictions`.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    report = describe_predictions(test, dev, **options, **protocol)
    chosen = report["at_dev_threshold"] or report["at_0.5"]
    report["strata"] = describe_strata(test, chosen["threshold"], **options)
    return report


def describe_predictions(
    test: PredictionTable,
    dev: PredictionTable | None,
    *,
    num_resamples: int,
    seed: int,
    dev_name: str = "dev",
    prevalences: Sequence[float] = PREVALENCES,
) -> dict[str, Any]:
    """Compute the numbers of all images together.

    Args:
        test: what is evaluated.
        dev: where the second threshold (Youden's) and the calibration come from; None: neither is there.
        num_resamples: patient-clustered bootstrap resamples behind each interval.
        seed: of the resamples and subsamples.
        dev_name: what dev is, in words.
        prevalences: shares of positives to which precision, F1, accuracy and NPV are re-weighted.

    Returns:
        Counts; an interval for each threshold-free metric; `at_0.5` and `at_dev_threshold` (None without one), each
        with its metrics, intervals, and the same at other prevalences; `reliability`, `calibration`.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    intervals = bootstrap_intervals(test.label, test.score, test.patient, THRESHOLD_FREE, level=LEVEL, **options)
    report = describe_counts(test) | {name: dataclasses.asdict(value) for name, value in intervals.items()}
    report["at_0.5"] = describe_threshold(test, FIXED_THRESHOLD, "fixed", prevalences, **options)
    report["at_dev_threshold"] = None  # one class on dev defines no threshold of its own
    threshold = compute_youden_threshold(dev.label, dev.score) if dev is not None else np.nan
    if np.isfinite(threshold):
        source = f"Youden's J on {dev_name} ({len(dev):,} images, {int(dev.label.sum()):,} positive)"
        report["at_dev_threshold"] = describe_threshold(test, threshold, source, prevalences, **options)
    report["reliability"] = compute_reliability_curve(test.label, test.score)
    report["calibration"] = describe_calibration(test, dev, dev_name, **options)
    return report


def describe_counts(table: PredictionTable) -> dict[str, Any]:
    """Count images, positives and patients; without a patient column every image stands for a patient."""
    patients = _patients(table)
    negative, positive = count_patients_by_class(table.label, patients)
    return {
        "num_images": len(table),
        "num_positives": int(table.label.sum()),
        "prevalence": float(table.label.mean()),
        "num_patients": len(np.unique(patients)),
        "num_positive_patients": positive,
        "num_negative_patients": negative,
        "interval_method": f"{LEVEL:.0%} by bootstrap over "
        + ("images, as the file names no patients" if table.patient is None else "patients"),
    }


def describe_threshold(
    table: PredictionTable,
    threshold: float,
    source: str,
    prevalences: Sequence[float] = PREVALENCES,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compute what depends on a threshold, at the own prevalence, at others by re-weighting, and paper-like.

    Returns:
        All of `compute_metrics`; `source` of the threshold; `intervals` by metric; `at_prevalence`, for each of
        `prevalences` the metrics that change with it, as intervals; `paper_like`, None where there are too few images.
    """
    values = compute_metrics(table.label, table.score, threshold) | {"source": source}
    counts = np.concatenate(
        [
            compute_weighted_confusion(table.label, table.score, weights, threshold)
            for weights in resample_patients(table.patient, len(table), num_resamples, seed)
        ]
    )
    both = counts[counts.sum(-1).all(-1)]  # a resample of one class says nothing about another prevalence
    units = count_patients(table.label, table.patient)

    samples = compute_confusion_metrics(counts)
    behind = table.label, table.score, table.patient, threshold
    values["intervals"] = {
        name: short_interval(
            make_interval_of(name, values[name], samples[name], LEVEL, count_patients_of(name, *behind))
        )
        for name in CONFUSION_METRICS
    }
    values["at_prevalence"] = {
        f"{prevalence:g}": _describe_at_prevalence(values, both, prevalence, units) for prevalence in prevalences
    }
    values["paper_like"] = None
    if table.label.any() and np.sum(table.label == 0) >= PAPER_LIKE_NEGATIVES:
        values["paper_like"] = compute_paper_like_metrics(table.label, table.score, threshold, seed=seed)
    return values


def _describe_at_prevalence(
    values: dict[str, Any], counts: np.ndarray, prevalence: float, num_patients: int
) -> dict[str, dict[str, float]]:
    """Return what depends on the prevalence; counts [R, 2, 2] are those of resamples."""
    estimates = compute_metrics_at_prevalence(values["confusion_matrix"], prevalence)
    samples = compute_confusion_metrics(reweight_confusion(counts, prevalence))
    rates = [
        [values["intervals"][name][end] for end in ("estimate", "low", "high")] for name in ("recall", "specificity")
    ]
    found = {
        name: make_interval(estimates[name], samples[name], LEVEL, num_patients)
        for name in CONFUSION_METRICS
        if name not in WITHOUT_PREVALENCE
    }
    return {name: short_interval(bound_by_rates(name, value, *rates, prevalence)) for name, value in found.items()}


def describe_calibration(
    test: PredictionTable, dev: PredictionTable | None, dev_name: str = "dev", *, num_resamples: int, seed: int
) -> dict[str, Any] | None:
    """Fit temperature and Platt scaling on dev and measure them on test; None where dev has not both classes."""
    if dev is None or not 0 < dev.label.sum() < len(dev):
        return None
    options = {"num_resamples": num_resamples, "seed": seed}
    fits = {"temperature": fit_temperature(dev.label, _logits(dev)), "platt": fit_platt(dev.label, _logits(dev))}
    fitted_on = f"{dev_name} ({len(dev):,} images, {int(dev.label.sum()):,} positive)"
    report = {"fitted_on": fitted_on, "before": _measure(test, **options)}
    for name, fit in fits.items():
        scores = fit.apply(_logits(test))
        calibrated = dataclasses.replace(test, score=scores, logit=fit.scale * _logits(test) + fit.bias)
        report[name] = dataclasses.asdict(fit) | _measure(calibrated, **options)
    return report


def _measure(table: PredictionTable, **options: int) -> dict[str, Any]:
    names = ("calibration_error", "brier_score")
    intervals = bootstrap_intervals(table.label, table.score, table.patient, names, level=LEVEL, **options)
    losses = np.logaddexp(0.0, _logits(table)) - table.label * _logits(table)
    intervals |= bootstrap_means({"log_loss": losses}, table.patient, level=LEVEL, **options)
    measured = {name: short_interval(value) for name, value in intervals.items()}
    return measured | {"reliability": compute_reliability_curve(table.label, table.score)}


def describe_strata(table: PredictionTable, threshold: float, *, num_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Compute AUROC, sensitivity and specificity by stratum.

    Returns:
        For each stratum its counts and `too_small`: fewer than `MIN_PATIENTS` patients of a class; its numbers are
        then left out.
    """
    patients, rows = _patients(table), []
    for stratum in find_strata(table.label, table.attributes):
        label, score, patient = table.label[stratum.mask], table.score[stratum.mask], patients[stratum.mask]
        negative, positive = count_patients_by_class(label, patient)
        row = {
            "by": stratum.by,
            "name": stratum.name,
            "num_images": len(label),
            "num_positives": int(label.sum()),
            "num_patients": len(np.unique(patient)),
            "num_positive_patients": positive,
            "num_negative_patients": negative,
            "threshold": float(threshold),
            "too_small": min(negative, positive) < MIN_PATIENTS,
        }
        if not row["too_small"]:
            options = {"num_resamples": num_resamples, "seed": seed}
            intervals = bootstrap_intervals(label, score, patient, STRATUM_METRICS, threshold=threshold, **options)
            row |= {name: short_interval(value) for name, value in intervals.items()}
        rows.append(row)
    return rows


def short_interval(interval: Any) -> dict[str, float]:
    """Return {'estimate', 'low', 'high'} of an Interval, and 'num_undefined' where resamples were left out."""
    values = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return values | ({"num_undefined": interval.num_undefined} if interval.num_undefined else {})


def _patients(table: PredictionTable) -> np.ndarray:
    return table.id if table.patient is None else table.patient


def _logits(table: PredictionTable) -> np.ndarray:
    if table.logit is not None:
        return table.logit
    return np.clip(special.logit(table.score), -MAX_LOGIT, MAX_LOGIT)
