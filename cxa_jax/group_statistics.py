"""Runs of one model that differ in the seed, as a group: combined statistics, and two groups compared.

All groups are resampled alike (same patients, same seed), so differences are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from cxa_jax.comparison import PairedTest, compute_delong_test
from cxa_jax.statistics import NUM_RESAMPLES, Interval, count_patients, make_interval, resample_patients
from cxa_jax.weighted_statistics import compute_weighted_statistics


@dataclass(frozen=True)
class GroupStatistic:
    """One statistic of a group.

    Attributes:
        values: of each run.
        sd: over the runs; nan for one run.
        interval: of the mean over runs. One run: percentiles over resampled patients. Several: mean +- z sqrt(variance
            over resampled patients + sd^2 / S), as in `statistics.combine_seeds`, cut to [0, 1].
        samples: [R], the mean over runs in each resample.
    """

    values: tuple[float, ...]
    sd: float
    interval: Interval
    samples: np.ndarray

    @property
    def seed_variance(self) -> float:
        """Variance of the mean that the choice of seeds brings; 0 where one run cannot show it."""
        return self.sd**2 / len(self.values) if len(self.values) > 1 else 0.0


def bootstrap_group(
    labels: ArrayLike,
    scores: Sequence[ArrayLike],
    patients: ArrayLike | None,
    statistics: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, GroupStatistic]:
    """Compute statistics of the runs of a group, and of their mean with a patient-clustered interval.

    Args:
        labels: [N], 0 or 1.
        scores: [S, N], one row a run.
        patients: [N], or None for independent images.
        statistics: names from `weighted_statistics.STATISTICS`.
        thresholds: [S], each run's own; 0.5 if not given.
    """
    labels = np.asarray(labels)
    thresholds = [0.5] * len(scores) if thresholds is None else thresholds

    def run_values(weights: np.ndarray) -> dict[str, np.ndarray]:
        rows = [
            compute_weighted_statistics(labels, run, weights, statistics, threshold)
            for run, threshold in zip(scores, thresholds, strict=True)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in statistics}

    values = run_values(np.ones((1, len(labels))))
    chunks = [run_values(weights) for weights in resample_patients(patients, len(labels), num_resamples, seed)]
    units = count_patients(labels, patients)
    group = {}
    for name in statistics:
        each, samples = values[name][:, 0], np.concatenate([chunk[name].mean(0) for chunk in chunks])
        sd = float(each.std(ddof=1)) if len(each) > 1 else math.nan
        interval = make_interval(each.mean(), samples, level, units)
        if len(each) > 1:
            error = math.sqrt(np.nanvar(samples) + sd**2 / len(each))
            interval = _normal_interval(interval, error, level, bounds=(0.0, 1.0))
        group[name] = GroupStatistic(tuple(each.tolist()), sd, interval, samples)
    return group


def _normal_interval(interval: Interval, error: float, level: float, bounds: tuple[float, float]) -> Interval:
    half = stats.norm.ppf((1 + level) / 2) * error
    low, high = (float(np.clip(interval.estimate + side * half, *bounds)) for side in (-1, 1))
    return Interval(interval.estimate, low, high, level, interval.num_resamples, interval.num_undefined)


def compare_groups(
    labels: ArrayLike, patients: ArrayLike | None, a: GroupStatistic, b: GroupStatistic, level: float = 0.95
) -> PairedTest:
    """Test the difference a - b of two groups' means, resampled alike.

    One run each: percentiles and their p-value, as `comparison.paired_bootstrap`. More runs: the seeds' variance is
    added to that over patients, and the p-value is the normal one.
    """
    differences = a.samples - b.samples
    estimate = a.interval.estimate - b.interval.estimate
    interval = make_interval(estimate, differences, level, count_patients(labels, patients))
    defined = differences[np.isfinite(differences)]
    if not len(defined):  # one class: nothing to compare
        return PairedTest(interval, math.nan, math.nan)
    error = math.sqrt(np.var(defined) + a.seed_variance + b.seed_variance)
    if max(len(a.values), len(b.values)) > 1:
        p_value = float(2 * stats.norm.sf(abs(estimate) / error)) if error > 0 else float(estimate == 0)
        return PairedTest(_normal_interval(interval, error, level, (-1.0, 1.0)), error, p_value)
    tail = min(np.sum(defined <= 0), np.sum(defined >= 0))
    return PairedTest(interval, error, float(min(1.0, (2 * tail + 1) / (len(defined) + 1))))


def compute_group_delong(labels: ArrayLike, scores_a: Sequence[ArrayLike], scores_b: Sequence[ArrayLike]) -> PairedTest:
    """Run DeLong's test on the mean scores of two groups; of one run each it is the usual test."""
    return compute_delong_test(labels, np.mean(scores_a, axis=0), np.mean(scores_b, axis=0))
