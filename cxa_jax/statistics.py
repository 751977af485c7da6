"""Uncertainty of evaluation results: patient-clustered bootstrap intervals.

Images of one patient resemble each other, so whole patients are resampled.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.errors import UserError
from cxa_jax.intervals import Interval, lower_by_bias, make_interval, make_interval_of
from cxa_jax.metrics import check_labels_and_scores
from cxa_jax.weighted_statistics import compute_weighted_statistics, find_denominator, name_units

NUM_RESAMPLES = 2000
MAX_CELLS = 2_000_000  # weights held at once (16 MB an array): bounds memory whatever the data and the resamples


def resample_patients(
    patients: ArrayLike | None, num_images: int, num_resamples: int, seed: int | np.random.Generator
) -> Iterator[np.ndarray]:
    """Draw patients with replacement and yield how often each image occurs, in chunks of resamples.

    Args:
        patients: [N] patient of each image; None takes every image for a patient of its own.
        num_images: N.
        num_resamples: resamples in all chunks together.
        seed: of the draws. The same seed and patients give the same resamples, whatever is computed on them.

    Yields:
        float64 [r, N] integer weights.

    Raises:
        UserError: another number of patients than images, or less than one resample.
    """
    patients = name_units(patients, num_images)
    if patients.shape != (num_images,):
        raise UserError(f"patients has shape {patients.shape}; needed is one patient for each of {num_images} images")
    if num_resamples < 1:
        raise UserError(f"num_resamples is {num_resamples}; needed is at least 1 (2000 for reported intervals)")
    rng = np.random.default_rng(seed)
    names, patient_of_image = np.unique(patients, return_inverse=True)
    chunk = max(1, MAX_CELLS // num_images)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        draws = rng.integers(len(names), size=(size, len(names)))
        cells = draws + np.arange(size)[:, None] * len(names)
        counts = np.bincount(cells.ravel(), minlength=size * len(names)).reshape(size, len(names))
        yield counts[:, patient_of_image].astype(np.float64)


def count_patients(labels: ArrayLike, patients: ArrayLike | None) -> int:
    """Count the patients of the rarer class: what the width of an interval hangs on."""
    labels = np.asarray(labels)
    patients = name_units(patients, len(labels))
    return min(len(np.unique(patients[labels == label])) for label in (0, 1))


def count_patients_of(
    statistic: str, labels: np.ndarray, scores: np.ndarray, patients: ArrayLike | None, threshold: float
) -> int:
    """Count the patients behind a statistic: of the images that it is a share of, else of the rarer class."""
    behind = find_denominator(statistic, labels, scores, threshold)
    if behind is None:
        return count_patients(labels, patients)
    return len(np.unique(name_units(patients, len(labels))[behind]))


def bootstrap_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: ArrayLike | None,
    statistics: Sequence[str] = ("auroc",),
    *,
    threshold: float = 0.5,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute patient-clustered intervals of several statistics on the same resamples.

    Args:
        labels: [N], 0 or 1.
        scores: [N].
        patients: [N], or None for independent images.
        statistics: names from `STATISTICS`.
        threshold: of the statistics that need one.

    Returns:
        name -> Interval.
    """
    labels, scores = check_labels_and_scores(labels, scores)
    estimates = compute_weighted_statistics(labels, scores, np.ones((1, len(labels))), statistics, threshold)
    chunks = [
        compute_weighted_statistics(labels, scores, weights, statistics, threshold)
        for weights in resample_patients(patients, len(labels), num_resamples, seed)
    ]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in statistics}
    units = {name: count_patients_of(name, labels, scores, patients, threshold) for name in statistics}
    intervals = {
        name: make_interval_of(name, estimates[name][0], samples[name], level, units[name]) for name in statistics
    }
    if "calibration_error" in intervals:
        intervals["calibration_error"] = lower_by_bias(intervals["calibration_error"], labels, [scores], patients)
    return intervals


def bootstrap_interval(
    labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None, statistic: str = "auroc", **options: float
) -> Interval:
    """Compute the interval of one statistic; options as in `bootstrap_intervals`."""
    return bootstrap_intervals(labels, scores, patients, (statistic,), **options)[statistic]


def bootstrap_means(
    columns: Mapping[str, ArrayLike],
    patients: ArrayLike | None,
    makers: Mapping[str, Callable[..., Interval]] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute patient-clustered intervals of the mean of per-image values [N]; nan values do not count.

    Args:
        columns: name -> [N].
        patients: [N], or None for independent images.
        makers: by name the rule of `intervals` for its kind, such as `make_share_interval`; else `make_interval`.
    """
    values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
    if not len(values):  # no image, such as no predicted positive: nothing is defined
        return {name: Interval(math.nan, math.nan, math.nan, level) for name in columns}
    estimates, samples, units = sample_means(values, patients, num_resamples, seed)
    return {
        name: (makers or {}).get(name, make_interval)(estimates[k], samples[k], level, units[k])
        for k, name in enumerate(columns)
    }


def sample_means(
    values: np.ndarray, patients: ArrayLike | None, num_resamples: int, seed: int | np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute means over images of K per-image values [N, K], and of the same in each resample; nan does not count.

    Returns:
        (means [K], resampled means [K, R], patients with a defined value [K]).
    """
    defined = np.isfinite(values).astype(np.float64)
    filled = np.where(defined > 0, values, 0.0)

    def weighted_means(weights: np.ndarray) -> np.ndarray:
        total, count = weights @ filled, weights @ defined
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    chunks = resample_patients(patients, len(values), num_resamples, seed)
    samples = np.concatenate([weighted_means(weights) for weights in chunks])
    names, patient_of_image = np.unique(name_units(patients, len(values)), return_inverse=True)
    counts = np.zeros((len(names), values.shape[1]))
    np.add.at(counts, patient_of_image, defined)
    return weighted_means(np.ones((1, len(values))))[0], samples.T, np.sum(counts > 0, axis=0)
