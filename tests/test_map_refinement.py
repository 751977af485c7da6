"""The guided filter against its equations, window by window, and against box filters of OpenCV."""

import cv2
import numpy as np
import pytest

from cxa_jax.errors import UserError
from cxa_jax.map_refinement import refine_map


def filter_by_loop(values, image, radius, eps):
    """He, Sun, Tang 2010: Eqs. (5), (6) in each window, Eq. (8) in each pixel."""
    height, width = image.shape
    windows = {}
    for row in range(height):
        for column in range(width):
            window = np.s_[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1]
            guide, part = image[window], values[window]
            covariance = np.mean(guide * part) - guide.mean() * part.mean()
            slope = covariance / (guide.var() + eps)
            windows[row, column] = slope, part.mean() - slope * guide.mean()
    result = np.empty_like(values)
    for row in range(height):
        for column in range(width):
            near = [fit for (i, j), fit in windows.items() if abs(i - row) <= radius and abs(j - column) <= radius]
            slope, intercept = np.mean(near, axis=0)
            result[row, column] = slope * image[row, column] + intercept
    return result


@pytest.mark.parametrize(("radius", "eps"), [(1, 1e-4), (3, 1e-2), (20, 0.1)])  # the last sees the whole image
def test_it_is_the_paper_s_filter(radius, eps):
    rng = np.random.default_rng(radius)
    values, image = rng.normal(size=(13, 17)), rng.random((13, 17))
    expected = filter_by_loop(values, image, radius, eps)
    np.testing.assert_allclose(refine_map(values, image, radius, eps), expected, atol=1e-10)
    assert np.abs(expected - values).max() > 0.1


@pytest.mark.parametrize("radius", [2, 8])
def test_it_is_the_filter_of_opencv_s_boxes(radius):
    rng = np.random.default_rng(4)
    values, image, eps = rng.random((64, 50)), rng.random((64, 50)), 1e-3
    size = (2 * radius + 1, 2 * radius + 1)
    sums = lambda x: cv2.boxFilter(x, cv2.CV_64F, size, normalize=False, borderType=cv2.BORDER_CONSTANT)  # noqa: E731
    mean = lambda x: sums(x) / sums(np.ones_like(x))  # noqa: E731
    slope = (mean(image * values) - mean(image) * mean(values)) / (mean(image**2) - mean(image) ** 2 + eps)
    expected = mean(slope) * image + mean(mean(values) - slope * mean(image))
    np.testing.assert_allclose(refine_map(values, image, radius, eps), expected, atol=1e-9)


def test_what_it_keeps_and_what_it_smooths():
    rng = np.random.default_rng(5)
    image = rng.random((30, 40))
    np.testing.assert_allclose(refine_map(3 * image - 1, image, 4, 1e-12), 3 * image - 1, atol=1e-8)
    np.testing.assert_allclose(refine_map(np.full((30, 40), 2.5), image, 4, 1e-3), 2.5, atol=1e-12)
    values = rng.random((30, 40))
    moved = refine_map(10 + 2 * values, image, 4, 1e-3)
    np.testing.assert_allclose(moved, 10 + 2 * refine_map(values, image, 4, 1e-3), atol=1e-9)
    flat = refine_map(values, np.full((30, 40), 0.7), 4, 1e-3)  # a box filter, twice
    assert flat.std() < 0.2 * values.std()


def test_a_blurred_map_moves_to_the_edge_of_its_image():
    image = np.zeros((64, 64))
    image[20:50, 16:44] = 1
    shape = image.astype(bool)
    blurred = cv2.GaussianBlur(image, (0, 0), 6)
    overlap = lambda found: (found & shape).sum() / (found | shape).sum()  # noqa: E731
    offset = cv2.warpAffine(blurred, np.float64([[1, 0, 3], [0, 1, -3]]), (64, 64))
    refined = refine_map(offset, image + np.random.default_rng(6).normal(0, 0.02, (64, 64)), 8, 1e-3)
    assert 1 - overlap(refined > 0.5) < 0.6 * (1 - overlap(offset > 0.5))


def test_what_does_not_fit_is_refused():
    values = np.zeros((5, 6))
    for wrong in (np.zeros((6, 5)), np.zeros((5, 6, 1))):
        with pytest.raises(UserError, match="the map has shape .5, 6., its image"):
            refine_map(values, wrong, 2, 0.1)
    with pytest.raises(UserError, match="holds nan or infinity"):
        refine_map(values, np.full((5, 6), np.nan), 2, 0.1)
    for radius, eps in ((0, 0.1), (2, 0.0), (2, np.nan)):
        with pytest.raises(UserError, match=f"radius={radius} must be at least 1 px, and eps={eps} above 0"):
            refine_map(values, values, radius, eps)
