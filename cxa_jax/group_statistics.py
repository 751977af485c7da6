"""Runs of one model that differ in the seed, as a group: combined statistics, and two groups compared.

All groups are resampled alike (same patients, same seed), so differences are paired. One run is summed up as
`statistics` does, several as `seed_comparison` does: the seeds' variance is added.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.comparison import MIN_COMPARED, PairedTest, compute_delong_test
from cxa_jax.intervals import (
    SHARES,
    Interval,
    bootstrap_p_value,
    lower_by_bias,
    make_count_interval,
    make_difference_interval,
    make_interval,
    make_interval_of,
    make_share_interval,
)
from cxa_jax.seed_comparison import SeedSamples, combine, make_t_interval
from cxa_jax.statistics import (
    NUM_RESAMPLES,
    bootstrap_means,
    count_patients_of,
    resample_patients,
    sample_means,
)
from cxa_jax.weighted_statistics import compute_weighted_statistics


@dataclass(frozen=True)
class GroupStatistic:
    """One statistic of a group.

    Attributes:
        values: of each run.
        sd: over the runs; nan for one run.
        interval: of the mean over runs. One run: as `statistics.bootstrap_intervals`. Several:
            `seed_comparison.combine`, cut to [0, 1].
        samples: [R], the mean over runs in each resample.
        num_patients: behind the statistic (`statistics.count_patients_of`).
    """

    values: tuple[float, ...]
    sd: float
    interval: Interval
    samples: np.ndarray
    num_patients: int

    @property
    def seed_part(self) -> list[tuple[float, int]]:
        """Variance of the mean that the choice of seeds brings, and its degrees of freedom; nothing for one run."""
        num_runs = len(self.values)
        return [(self.sd**2 / num_runs, num_runs - 1)] if num_runs > 1 else []


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
    group = {}
    for name in statistics:
        units = min(
            count_patients_of(name, labels, np.asarray(run), patients, threshold)
            for run, threshold in zip(scores, thresholds, strict=True)
        )
        each, resampled = values[name][:, 0], np.concatenate([chunk[name] for chunk in chunks], axis=1)
        mean = resampled.mean(axis=0)
        if len(each) > 1:
            interval = combine(SeedSamples(each, resampled, units), level, (0.0, 1.0), kind=_find_kind(name))
        else:
            interval = make_interval_of(name, each[0], mean, level, units)
        if name == "calibration_error":
            interval = lower_by_bias(interval, labels, scores, patients)
        sd = float(each.std(ddof=1)) if len(each) > 1 else math.nan
        group[name] = GroupStatistic(tuple(each.tolist()), sd, interval, mean, units)
    return group


def _find_kind(statistic: str) -> str:
    return "area" if statistic == "auroc" else "share" if statistic in SHARES else ""


# Kinds of per-image values: the rule for their mean in one run, and the least and the largest mean there can be.
MEAN_KINDS = {
    "share": (make_share_interval, (0.0, 1.0)),
    "count": (make_count_interval, (0.0, math.inf)),
    "ratio": (make_interval, (0.0, math.inf)),
    "difference": (make_difference_interval, (-1.0, 1.0)),  # of two numbers in [0, 1], such as hits or overlaps
    "ratio_difference": (make_interval, (-math.inf, math.inf)),
}


def bootstrap_group_means(
    runs: Sequence[Mapping[Hashable, ArrayLike]],
    patients: ArrayLike,
    kinds: Mapping[Hashable, str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[Hashable, Interval]:
    """Compute intervals of the mean over images of per-image values, and over the runs of a group.

    Args:
        runs: for each run name -> [N], all of the same images; nan where not defined.
        patients: [N].
        kinds: name -> one of MEAN_KINDS.
    """
    if len(runs) == 1 or not len(np.asarray(patients)):  # without an image nothing is defined
        makers = {name: MEAN_KINDS[kind][0] for name, kind in kinds.items()}
        return bootstrap_means(runs[0], patients, makers, num_resamples=num_resamples, seed=seed, level=level)
    # All runs at once: they share their resamples.
    columns = np.stack([run[name] for run in runs for name in kinds], axis=1)
    estimates, resampled, units = sample_means(columns, patients, num_resamples, seed)
    shape = len(runs), len(kinds)
    estimates, resampled = estimates.reshape(shape), resampled.reshape(*shape, -1)  # [S, K], [S, K, R]
    units = units.reshape(shape).max(axis=0)
    return {
        name: combine(
            SeedSamples(estimates[:, k], resampled[:, k], int(units[k])),
            level,
            MEAN_KINDS[kind][1],
            kind=kind,
        )
        for k, (name, kind) in enumerate(kinds.items())
    }


def compare_groups(a: GroupStatistic, b: GroupStatistic, level: float = 0.95) -> PairedTest:
    """Test the difference a - b of two groups' means, resampled alike.

    One run each: percentiles and their p-value, as `comparison.paired_bootstrap`. More runs: the variances of either
    group's seeds are added to that over patients, as in `seed_comparison.make_t_interval`.
    """
    differences = a.samples - b.samples
    estimate = a.interval.estimate - b.interval.estimate
    defined = differences[np.isfinite(differences)]
    if not len(defined) or a.num_patients < MIN_COMPARED:
        return PairedTest(Interval(estimate, math.nan, math.nan, level), math.nan, math.nan)
    if max(len(a.values), len(b.values)) > 1:
        parts = [(float(np.var(defined)), max(a.num_patients - 1, 1)), *a.seed_part, *b.seed_part]
        return PairedTest(*make_t_interval(estimate, parts, level, (-1.0, 1.0)))
    interval = make_interval(estimate, differences, level, a.num_patients)
    return PairedTest(interval, float(np.std(defined)), bootstrap_p_value(differences, a.num_patients))


def compute_group_delong(labels: ArrayLike, scores_a: Sequence[ArrayLike], scores_b: Sequence[ArrayLike]) -> PairedTest:
    """Run DeLong's test on the mean scores of two groups; of one run each it is the usual test."""
    return compute_delong_test(labels, np.mean(scores_a, axis=0), np.mean(scores_b, axis=0))
