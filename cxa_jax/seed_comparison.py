"""Several training runs of each model on the same images: means over seeds, and paired differences, with intervals.

Two things vary: which patients are in the test set, and the seed of the training. Patients are resampled, the same ones
for every run, so that what two models share cancels in their difference; the seeds add the variance of their mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from cxa_jax import statistics
from cxa_jax.errors import UserError
from cxa_jax.intervals import Interval, shrink_share, widen_certainty, widen_constant, widen_difference
from cxa_jax.statistics import NUM_RESAMPLES
from cxa_jax.weighted_statistics import compute_weighted_statistics


@dataclass(frozen=True)
class SeedSamples:
    """One statistic of the runs of one model.

    Attributes:
      estimates: [S], one a seed, over all images.
      resampled: [S, R], over the same R resamples of patients in every run.
      num_patients: that were resampled.
    """

    estimates: np.ndarray
    resampled: np.ndarray
    num_patients: int


def sample_auroc(
    labels: ArrayLike, scores: ArrayLike, patients: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> SeedSamples:
    """Compute the AUROC of each run and of each resample; scores [S, N], one row a seed."""
    rows = np.atleast_2d(scores)
    labels = np.asarray(labels)

    def of_weights(weights: np.ndarray) -> np.ndarray:
        return np.stack([compute_weighted_statistics(labels, row, weights, ("auroc",))["auroc"] for row in rows])

    chunks = statistics.resample_patients(patients, len(labels), num_resamples, seed)
    resampled = np.concatenate([of_weights(weights) for weights in chunks], axis=1)
    estimates = of_weights(np.ones((1, len(labels))))[:, 0]
    return SeedSamples(estimates, resampled, statistics.count_patients(labels, patients))


def sample_means(
    values: ArrayLike, patients: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> SeedSamples:
    """Compute the mean over images of each run and of each resample; values [S, N], nan where not defined."""
    rows = np.atleast_2d(np.asarray(values, np.float64))
    estimates, resampled, units = statistics.sample_means(rows.T, patients, num_resamples, seed)
    return SeedSamples(estimates, resampled, int(units.max()))


def combine(
    samples: SeedSamples,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    *,
    kind: str = "",
) -> Interval:
    """Return the mean over seeds and its interval, for the mean of such trainings on such patients.

    Two variances (`make_t_interval`): that of the mean over resamples of patients, and sd^2 / S over the S seeds. With
    one seed the second is unknown: the interval holds the first alone. It is cut to `bounds`.

    Args:
      kind: 'share' of images: the first variance is Agresti and Coull's, about their centre (`intervals.shrink_share`),
        for resamples of a share near 0 or 1 vary too little, and of none or all not at all. 'area' under the ROC
        curve: on the logit scale, as of one run (`intervals.make_area_interval`). 'count': `intervals.widen_constant`.
        'difference' of numbers in [0, 1]: `intervals.widen_difference`.
    """
    mean, estimate = samples.resampled.mean(axis=0), float(samples.estimates.mean())
    num_seeds, num_defined = len(samples.estimates), int(np.isfinite(mean).sum())
    num_patients, free = samples.num_patients, max(samples.num_patients - 1, 1)
    centre, between_patients = estimate, float(np.nanvar(mean, ddof=1)) if num_defined > 1 else math.nan
    if kind == "share" and math.isfinite(estimate):
        centre, between_patients = shrink_share(estimate, mean, level, num_patients)
    parts = [(between_patients, free)]
    if num_seeds > 1:
        parts.append((float(samples.estimates.var(ddof=1)) / num_seeds, num_seeds - 1))
    if kind == "area" and 0 < estimate < 1:
        parts[0] = between_patients * num_patients / free, free
        slope = estimate * (1 - estimate)  # of the logit's inverse
        on_logits = [(variance / slope**2, freedom) for variance, freedom in parts]
        ends, _, _ = make_t_interval(float(special.logit(estimate)), on_logits, level, (-math.inf, math.inf))
        low, high = float(special.expit(ends.low)), float(special.expit(ends.high))
    else:
        ends, _, _ = make_t_interval(centre, parts, level, bounds)
        low, high = min(ends.low, estimate), max(ends.high, estimate)
    interval = Interval(estimate, low, high, level, len(mean), len(mean) - num_defined)
    if kind == "count":
        return widen_constant(interval, num_patients)
    if kind == "difference":
        return widen_difference(interval, num_patients)
    return widen_certainty(interval, num_patients) if bounds == (0.0, 1.0) else interval


def make_t_interval(
    estimate: float, parts: Sequence[tuple[float, int]], level: float, bounds: tuple[float, float]
) -> tuple[Interval, float, float]:
    """Return ``estimate +- t sqrt(V)``, cut to `bounds`, with V the sum of independent variances; sqrt(V); p of "0".

    t has the degrees of freedom of Welch and Satterthwaite, ``V^2 / sum(V_i^2 / n_i)``, because a variance of a few
    seeds is itself uncertain: with two of them 1.96 would be far too short.

    Args:
      estimate: a mean, or a difference of means.
      parts: (V_i, its degrees of freedom n_i).
      level: of confidence.
      bounds: of the interval.
    """
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / free for part, free in parts)
    if not spread > 0:  # nothing varies, or the variance is not defined
        error = math.sqrt(variance) if variance >= 0 else math.nan
        p_value = float(estimate == 0) if error == 0 else math.nan
        return Interval(estimate, estimate + error, estimate + error, level), error, p_value
    error, free = math.sqrt(variance), variance**2 / spread
    half = stats.t.ppf((1 + level) / 2, free) * error
    low, high = max(estimate - half, bounds[0]), min(estimate + half, bounds[1])
    return Interval(estimate, low, high, level), error, float(2 * stats.t.sf(abs(estimate) / error, free))


def compare(
    a: SeedSamples, b: SeedSamples, level: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Return the mean difference a - b and its interval; runs are paired by seed, resamples by their patients.

    The interval is cut to `bounds`, the least and the largest difference there can be.

    Raises:
      UserError: the two are not of the same seeds and resamples.
    """
    if a.resampled.shape != b.resampled.shape or a.num_patients != b.num_patients:
        raise UserError(f"runs cannot be paired: {a.resampled.shape} and {b.resampled.shape} (seeds, resamples)")
    difference = SeedSamples(a.estimates - b.estimates, a.resampled - b.resampled, a.num_patients)
    return combine(difference, level, bounds, kind="difference" if bounds == (-1.0, 1.0) else "")
