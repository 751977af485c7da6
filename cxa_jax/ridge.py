"""Ridge regression over standardised columns, one decomposition for all penalties."""

from collections.abc import Iterable

import numpy as np


def fit_ridge(features: np.ndarray, targets: np.ndarray, alphas: Iterable[float]) -> list[tuple[np.ndarray, ...]]:
    """Minimise |targets - intercept - X b|^2 + alpha |b|^2 over standardised X (Hoerl and Kennard 1970).

    Args:
        features: float64 [N, F]; X is these less their mean, over their standard deviation; constant columns stay 0.
        targets: float64 [N, K].
        alphas: penalties, above 0.

    Returns:
        For each alpha (center [F], scale [F], b [F, K], intercept [K]).
    """
    center, intercept = features.mean(axis=0), targets.mean(axis=0)
    scale = np.where(np.ptp(features, axis=0) > 0, features.std(axis=0), 1.0)
    u, s, v = np.linalg.svd((features - center) / scale, full_matrices=False)
    projected = u.T @ (targets - intercept)
    return [(center, scale, v.T @ ((s / (s**2 + alpha))[:, None] * projected), intercept) for alpha in alphas]


def apply_ridge(
    features: np.ndarray, center: np.ndarray, scale: np.ndarray, coefficients: np.ndarray, intercept: np.ndarray
) -> np.ndarray:
    """Return the predictions [N, K] of one fit of `fit_ridge`."""
    return (features - center) / scale @ coefficients + intercept
