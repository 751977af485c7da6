"""From a heat map to boxes: aligned bilinear upsampling, scaling to [0, 1], threshold rules, components.

No plotting, and nothing here sees a true box.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from cxa_jax.errors import UserError

WANG_LEVELS = (60 / 255, 180 / 255)
SCALINGS = ("unit", "min_max", "positive")
RULES = ("wang", "half_max", "otsu")


def compute_cell_centers(num_cells: int, stride: float, offset: float) -> np.ndarray:
    """Compute the pixel index of each cell's receptive-field centre: offset + stride * j, float64 [num_cells]."""
    return offset + stride * np.arange(num_cells, dtype=np.float64)


def _interpolation_matrix(size_px: int, num_cells: int, stride: float, offset: float) -> np.ndarray:
    cells = np.clip((np.arange(size_px) - offset) / stride, 0, num_cells - 1)  # beyond the outer centres: clamped
    left = np.minimum(np.floor(cells).astype(np.int64), max(num_cells - 2, 0))
    matrix = np.zeros((size_px, num_cells))
    rows = np.arange(size_px)
    matrix[rows, left] = 1 - (cells - left)
    matrix[rows, np.minimum(left + 1, num_cells - 1)] += cells - left
    return matrix


def upsample_maps(maps: ArrayLike, image_size: int | tuple[int, int], stride: float, offset: float) -> np.ndarray:
    """Upsample bilinearly so that cell j lies on pixel offset + stride * j; beyond the outer cells the edge goes on.

    pixel p reads the map at (p - offset) / stride. A plain resize would spread the cells over the whole image.

    Args:
        maps: [..., h, w].
        image_size: (H, W) or the side of a square, px of the image that the backbone saw.
        stride: px between cells (32).
        offset: px of cell 0's centre: 14 DenseNet, 0 ResNet-50, 37 Inception-ResNet-v2; 16 more undoes the half
            cell of the attention's 2x2 average pool.

    Returns:
        float64 [..., H, W].
    """
    maps = np.asarray(maps, np.float64)
    height, width = height_and_width(image_size)
    vertical = _interpolation_matrix(height, maps.shape[-2], stride, offset)
    horizontal = _interpolation_matrix(width, maps.shape[-1], stride, offset)
    return vertical @ maps @ horizontal.T


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of an image size given as such or as the side of a square."""
    return (image_size, image_size) if isinstance(image_size, int | np.integer) else tuple(image_size)


def scale_map(values: np.ndarray, scaling: str) -> np.ndarray:
    """Scale one map to [0, 1].

    Args:
        values: [H, W].
        scaling: 'unit' leaves W on its fixed scale of 0-1; 'min_max' stretches each map (p, unsigned maps), a
            constant one becomes 0; 'positive' cuts at 0 and divides by the maximum (signed evidence, CAM).

    Raises:
        UserError: unknown scaling, or 'unit' on values outside [0, 1].
    """
    low, high = float(values.min()), float(values.max())
    if scaling == "unit":
        if low < -1e-6 or high > 1 + 1e-6:
            raise UserError(f"scaling 'unit' is for maps in [0, 1]; this one spans [{low:.4g}, {high:.4g}]")
        return np.clip(values, 0, 1)
    if scaling == "min_max":
        return (values - low) / (high - low) if high > low else np.zeros_like(values)
    if scaling == "positive":
        return np.clip(values, 0, None) / high if high > 0 else np.zeros_like(values)
    raise UserError(f"unknown scaling {scaling!r}; known are {', '.join(SCALINGS)}")


def compute_otsu_level(levels: np.ndarray) -> int:
    """Compute the byte t that maximises the variance between {<= t} and {> t} (Otsu 1979); levels uint8 [H, W]."""
    histogram = np.bincount(levels.ravel(), minlength=256) / levels.size
    weight = np.cumsum(histogram)
    moment = np.cumsum(histogram * np.arange(256))
    spread = weight * (1 - weight)
    gap = (moment[-1] * weight - moment) ** 2
    between = np.divide(gap, spread, out=np.zeros(256), where=spread > 1e-12)
    return int(np.argmax(between))


def threshold_map(values: np.ndarray, rule: str | float) -> list[np.ndarray]:
    """Return the masks [H, W] of a scaled map: two for 'wang' (60 and 180 of 255), one for the other rules.

    Args:
        values: [H, W] in [0, 1].
        rule: 'wang', 'half_max' (at least half of the map's maximum), 'otsu' (above Otsu's level), or a number in
            (0, 1): at least that value.

    Raises:
        UserError: unknown rule, or a number outside (0, 1).
    """
    if values.max() <= 0:
        return [np.zeros(values.shape, bool)]
    if rule == "wang":
        return [values >= level for level in WANG_LEVELS]
    if rule == "half_max":
        return [values >= values.max() / 2]
    if rule == "otsu":
        levels = np.round(values * 255).astype(np.uint8)  # in bytes, as CheXlocalize has it
        return [levels > compute_otsu_level(levels)]
    if isinstance(rule, str) or not 0 < rule < 1:
        raise UserError(f"unknown threshold rule {rule!r}; known are {', '.join(RULES)} and numbers between 0 and 1")
    return [values >= rule]


def find_boxes(mask: np.ndarray) -> np.ndarray:
    """Return the tight boxes [K, 4] of a mask's 8-connected components, the one of most pixels first."""
    components, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    slices = ndimage.find_objects(components)
    boxes = [(s[1].start, s[0].start, s[1].stop - s[1].start, s[0].stop - s[0].start) for s in slices]
    return np.array(boxes, np.float64).reshape(-1, 4)[np.argsort(-sizes, kind="stable")]


def detect_boxes(values: np.ndarray, rule: str | float) -> np.ndarray:
    """Return the detected boxes [K, 4] of a scaled map: every component for 'wang', else the largest; K = 0: a miss."""
    found = [find_boxes(mask) for mask in threshold_map(values, rule)]
    return np.concatenate(found) if rule == "wang" else found[0][:1]
