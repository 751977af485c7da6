"""Refine an upsampled map by the edges of its image, by the guided filter. Nothing here sees a true box."""

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.errors import UserError


def refine_map(values: ArrayLike, image: ArrayLike, radius: int, eps: float) -> np.ndarray:
    """Filter a map guided by its image, so that its slopes move to the image's edges (He, Sun, Tang 2010, Eqs. 4-8).

    In each window the result is linear in the image, ``q = a I + b`` with ``a = cov(I, p) / (var(I) + eps)`` and
    ``b = mean(p) - a mean(I)``; a pixel takes the mean a and b of the windows that hold it. Windows are cut at the
    border. The result may leave the range of the map a little, as the image does within a window.

    Args:
        values: p, [H, W], finite: a map upsampled to the pixels of its image.
        image: I, [H, W], finite, in [0, 1].
        radius: px, of the windows of 2 radius + 1 squared; about one cell of the map.
        eps: above 0, variance of the image below which a window is flat, and the map smoothed there; 0.01^2 to 0.1^2.

    Returns:
        q, float64 [H, W].

    Raises:
        UserError: shapes that differ, numbers that are not finite, a radius below 1 or an eps not above 0.
    """
    values, image = np.asarray(values, np.float64), np.asarray(image, np.float64)
    if values.ndim != 2 or values.shape != image.shape:
        raise UserError(f"the map has shape {values.shape}, its image {image.shape}; needed is [H, W] for both")
    if not (np.isfinite(values).all() and np.isfinite(image).all()):
        raise UserError("a map or its image holds nan or infinity")
    if radius < 1 or not eps > 0:
        raise UserError(f"radius={radius} must be at least 1 px, and eps={eps} above 0")
    # Centred, which alters nothing but the digits: variances are differences of large numbers otherwise.
    level, image, values = values.mean(), image - image.mean(), values - values.mean()
    image_mean, values_mean = _mean_of_windows(image, radius), _mean_of_windows(values, radius)
    variance = _mean_of_windows(image**2, radius) - image_mean**2
    covariance = _mean_of_windows(image * values, radius) - image_mean * values_mean
    slope = covariance / (np.maximum(variance, 0) + eps)
    intercept = values_mean - slope * image_mean
    return level + _mean_of_windows(slope, radius) * image + _mean_of_windows(intercept, radius)


def _mean_of_windows(values: np.ndarray, radius: int) -> np.ndarray:
    """Return the mean of each pixel's window, cut at the border; as fast for large windows as for small ones."""
    for axis, size in enumerate(values.shape):
        ends = np.minimum(np.arange(size) + radius + 1, size)
        starts = np.maximum(np.arange(size) - radius, 0)
        sums = np.insert(np.cumsum(values, axis=axis), 0, 0, axis=axis)
        counts = np.expand_dims(ends - starts, 1 - axis)
        values = (np.take(sums, ends, axis=axis) - np.take(sums, starts, axis=axis)) / counts
    return values
