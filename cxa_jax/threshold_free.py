"""Scores of maps that choose no threshold: MaxBoxAccV2 on boxes, pixel average precision (PxAP) on masks.

After Choe et al. 2020 (arXiv 2001.07437) and its journal version (2007.04178), whose code is clovaai/wsolevaluation.
MaxBoxAccV2 takes the best level on the images that it scores, so it flatters every map, a control's as much.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.boxes import compute_iou
from cxa_jax.heat_maps import find_stacked_boxes, height_and_width, scale_map, upsample_maps
from cxa_jax.intervals import Interval, make_share_interval
from cxa_jax.statistics import resample_patients

LEVELS = np.arange(100) / 100  # of the map stretched to [0, 1]; above 1 there is nothing
IOU_THRESHOLDS = (0.3, 0.5, 0.7)
MAX_SIDE = 64  # px of the frame that boxes are found in: time grows with its square, and a cell is coarser
MAX_RESAMPLES = 500  # behind an interval, which is then good to a few hundredths of its width
NUM_BINS = 1000  # of pixel values, as wsolevaluation has it, and one more for the maximum


class Frame(NamedTuple):
    """An image's frame and the map's place in it; `scale` px of it are one px of the image."""

    image_size: tuple[int, int]
    stride: float
    offset: float
    scale: float


def reduce_frame(image_size: int | tuple[int, int], stride: float, offset: float, max_side: int = MAX_SIDE) -> Frame:
    """Return the frame itself or one whose longer side is `max_side` px, for boxes that need not be exact to a pixel.

    A pixel of the reduced frame covers 1 / scale px, from whose middle the map is read.
    """
    height, width = height_and_width(image_size)
    scale = min(1.0, max_side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return Frame(size, stride * scale, (offset + 0.5) * scale - 0.5, scale)


def find_level_boxes(
    maps: ArrayLike,
    image_size: int | tuple[int, int],
    stride: float,
    offset: float,
    *,
    scaling: str = "min_max",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find the boxes of all components above each of `LEVELS`, of each map scaled, then stretched to [0, 1].

    wsolevaluation takes the contours of bytes, inner ones too; here it is 8-connected components of the values.

    Args:
        maps: [N, h, w].
        image_size: (H, W) or the side of a square, px; larger ones are reduced (`MAX_SIDE`).
        stride: px between cells.
        offset: px of cell 0's centre.
        scaling: see `scale_map`.

    Returns:
        For each map (boxes [K, 4] in px of the image, the level's index of each [K]).
    """
    frame, found = reduce_frame(image_size, stride, offset), []
    for cells in np.asarray(maps, np.float64):
        upsampled = upsample_maps(cells, frame.image_size, frame.stride, frame.offset)
        values = scale_map(scale_map(upsampled, scaling), "min_max")
        boxes, levels, _ = find_stacked_boxes(values > LEVELS[:, None, None])
        found.append((boxes / frame.scale, levels))
    return found


def compute_best_overlaps(found: Sequence[tuple[np.ndarray, np.ndarray]], boxes: ArrayLike) -> np.ndarray:
    """Compute the best IoU with the true box at each level, [N, levels]; 0 where nothing is above it.

    Args:
        found: `find_level_boxes`.
        boxes: [N, 4], the true ones.
    """
    best = np.zeros((len(found), len(LEVELS)))
    for row, (detected, levels), box in zip(best, found, np.asarray(boxes, np.float64), strict=True):
        np.maximum.at(row, levels, compute_iou(detected, box))
    return best


def compute_max_box_accuracies(overlaps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute for each IoU of `IOU_THRESHOLDS` the share of images whose best box reaches it, at the best level.

    Their mean is MaxBoxAccV2.

    Args:
        overlaps: [N, levels], `compute_best_overlaps`.
        weights: [R, N], how often each image counts; ones for the data as they are.

    Returns:
        [3, R].
    """
    total = weights.sum(axis=1)
    return np.stack([(weights @ (overlaps >= iou)).max(axis=1) / total for iou in IOU_THRESHOLDS])


def count_pixels(
    maps: ArrayLike,
    masks: ArrayLike,
    image_size: int | tuple[int, int],
    stride: float,
    offset: float,
    *,
    scaling: str = "min_max",
) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of each mask, and those outside, by the value of the map, scaled and stretched to [0, 1].

    Args:
        maps: [N, h, w].
        masks: [N, H, W], non-zero on the object.
        image_size: (H, W) or the side of a square, px.
        stride: px between cells.
        offset: px of cell 0's centre.
        scaling: see `scale_map`.

    Returns:
        (inside [N, bins], outside [N, bins]); bin b holds values in [b, b + 1) / 1000, the last the value 1.
    """
    size, counts = height_and_width(image_size), []
    for cells, mask in zip(np.asarray(maps, np.float64), np.asarray(masks), strict=True):
        values = scale_map(scale_map(upsample_maps(cells, size, stride, offset), scaling), "min_max")
        bins = (values * NUM_BINS).astype(np.int64)
        counts.append([np.bincount(bins[region], minlength=NUM_BINS + 1) for region in (mask != 0, mask == 0)])
    both = np.array(counts, np.float64).reshape(-1, 2, NUM_BINS + 1)
    return both[:, 0], both[:, 1]


def compute_pixel_precision(inside: np.ndarray, outside: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute PxAP, the area under precision over recall of all images' pixels together.

    ``sum over bins b, highest first, of precision_b (recall_b - recall_{b-1})``; chance is the masks' share of the
    pixels.

    Args:
        inside: [N, bins], `count_pixels`.
        outside: [N, bins].
        weights: [R, N], how often each image counts.

    Returns:
        [R]; nan without a pixel inside.
    """
    hits = np.cumsum((weights @ inside)[:, ::-1], axis=1)
    called = hits + np.cumsum((weights @ outside)[:, ::-1], axis=1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    gained = np.sum(precision * np.diff(hits, axis=1, prepend=0), axis=1)
    return np.divide(gained, hits[:, -1], out=np.full(len(hits), np.nan), where=hits[:, -1] > 0)


def summarize_threshold_free(
    overlaps: np.ndarray,
    pixels: tuple[np.ndarray, np.ndarray] | None,
    patients: ArrayLike,
    *,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute MaxBoxAccV2, its three parts and PxAP with patient-bootstrap intervals; a resample takes its best level.

    Args:
        overlaps: [N, levels], `compute_best_overlaps`.
        pixels: `count_pixels`, or None without masks.
        patients: [N].
        num_resamples: at most `MAX_RESAMPLES` are drawn.

    Returns:
        max_box_acc_v2, max_box_acc_T for each IoU T, and with masks px_ap.
    """

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        parts = compute_max_box_accuracies(overlaps, weights)
        values = {"max_box_acc_v2": parts.mean(axis=0)}
        values |= {f"max_box_acc_{iou:g}": part for iou, part in zip(IOU_THRESHOLDS, parts, strict=True)}
        return values if pixels is None else values | {"px_ap": compute_pixel_precision(*pixels, weights)}

    estimates = compute(np.ones((1, len(overlaps))))
    draws = resample_patients(patients, len(overlaps), min(num_resamples, MAX_RESAMPLES), seed)
    chunks = [compute(weights) for weights in draws]
    num_patients = len(np.unique(np.asarray(patients)))
    return {
        name: make_share_interval(
            float(estimate[0]), np.concatenate([chunk[name] for chunk in chunks]), level, num_patients
        )
        for name, estimate in estimates.items()
    }
