"""How well one measurement agrees with another of the same images (Bland and Altman 1986), patients resampled."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.classification import LEVEL, short_interval
from cxa_jax.errors import UserError
from cxa_jax.intervals import make_interval
from cxa_jax.statistics import resample_patients
from cxa_jax.weighted_statistics import name_units

AGREEMENT = ("mean_absolute_error", "bias", "sd", "limit_low", "limit_high", "correlation")
LIMITS = 1.96  # sd on either side of the bias


def describe_agreement(
    estimates: ArrayLike, truths: ArrayLike, patients: ArrayLike | None, *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Compute AGREEMENT of estimates with truths, each with its interval, and how many images were measured.

    Args:
        estimates: [N]; nan for an image that could not be measured: left out and counted.
        truths: [N], finite.
        patients: [N], or None for independent images.
        num_resamples: patient-clustered resamples behind each interval.
        seed: of the resamples.

    Returns:
        name -> {'estimate', 'low', 'high'}; `num_images`, `num_patients`, `num_unmeasured`.

    Raises:
        UserError: columns of different lengths.
    """
    estimates, truths = np.asarray(estimates, np.float64), np.asarray(truths, np.float64)
    patients = name_units(patients, len(truths))
    if not estimates.shape == truths.shape == patients.shape:
        raise UserError(f"{len(estimates)} estimates, {len(truths)} truths, {len(patients)} patients: not as many")
    measured = np.isfinite(estimates)
    a, b, units = estimates[measured], truths[measured], patients[measured]
    num_patients = len(np.unique(units))
    values = dict.fromkeys(AGREEMENT)
    if num_patients > 1:
        whole = compute_agreement(a, b, np.ones((1, len(a))))
        chunks = [compute_agreement(a, b, weights) for weights in resample_patients(units, len(a), num_resamples, seed)]
        for name in AGREEMENT:
            samples = np.concatenate([chunk[name] for chunk in chunks])
            values[name] = short_interval(make_interval(whole[name][0], samples, LEVEL, num_patients))
    counts = {"num_images": len(a), "num_patients": num_patients, "num_unmeasured": int(np.sum(~measured))}
    return values | counts


def compute_agreement(estimates: np.ndarray, truths: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Compute AGREEMENT under weights [R, N], how often each image occurs: name -> [R].

    The difference is estimate less truth; its sd has n - 1 below; limits of agreement are bias -+ 1.96 sd; Pearson's
    correlation is nan where one side is constant.
    """
    difference, total = estimates - truths, weights.sum(axis=1)
    bias = weights @ difference / total
    sd = np.sqrt(np.maximum(weights @ difference**2 - total * bias**2, 0) / np.maximum(total - 1, 1))
    a, b = estimates - estimates.mean(), truths - truths.mean()
    mean_a, mean_b = weights @ a / total, weights @ b / total
    spread = np.sqrt((weights @ a**2 / total - mean_a**2).clip(0) * (weights @ b**2 / total - mean_b**2).clip(0))
    shared = weights @ (a * b) / total - mean_a * mean_b
    return {
        "mean_absolute_error": weights @ np.abs(difference) / total,
        "bias": bias,
        "sd": sd,
        "limit_low": bias - LIMITS * sd,
        "limit_high": bias + LIMITS * sd,
        "correlation": np.divide(shared, spread, out=np.full(len(total), np.nan), where=spread > 1e-12),
    }
