"""MaxBoxAccV2 and PxAP against slow twins: OpenCV's components level by level, scikit-learn's average precision."""

import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cxa_jax import threshold_free
from cxa_jax.boxes import compute_iou
from cxa_jax.heat_maps import scale_map, upsample_maps

SIZE, STRIDE, OFFSET = 48, 8, 2


def _draw(seed: int, num_images: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Draw maps [N, 6, 6] of either sign and boxes in an image of 48 px."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(2, 20, (num_images, 2))
    return rng.normal(size=(num_images, 6, 6)), np.concatenate([corners, rng.uniform(10, 26, (num_images, 2))], axis=1)


def _stretch(cells: np.ndarray, scaling: str) -> np.ndarray:
    values = scale_map(upsample_maps(cells, SIZE, STRIDE, OFFSET), scaling)
    return (values - values.min()) / (values.max() - values.min())


def _score_slowly(maps: np.ndarray, boxes: np.ndarray, scaling: str) -> list[float]:
    """Return MaxBoxAccV2's three parts as wsolevaluation defines them: level by level, image by image."""
    hits = np.zeros((3, 100))
    for cells, box in zip(maps, boxes, strict=True):
        values = _stretch(cells, scaling)
        for level in range(100):
            mask = (values > level / 100).astype(np.uint8)
            _, _, found, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            best = max((compute_iou(row[:4], box) for row in found[1:].astype(float)), default=0)
            hits[:, level] += [best >= iou for iou in (0.3, 0.5, 0.7)]
    return (hits.max(axis=1) / len(maps)).tolist()


@pytest.mark.parametrize("scaling", ["min_max", "positive", "absolute"])
def test_max_box_accuracy_is_its_slow_twin(scaling: str):
    maps, boxes = _draw(1)
    found = threshold_free.find_level_boxes(maps, SIZE, STRIDE, OFFSET, scaling=scaling)
    overlaps = threshold_free.compute_best_overlaps(found, boxes)
    parts = threshold_free.compute_max_box_accuracies(overlaps, np.ones((1, 7)))[:, 0]
    expected = _score_slowly(maps, boxes, scaling)
    assert parts == pytest.approx(expected) and len(set(expected)) > 1
    rng = np.random.default_rng(2)
    weights = rng.integers(0, 3, (4, 7)).astype(float) + np.eye(4, 7)
    for row, resampled in zip(weights, threshold_free.compute_max_box_accuracies(overlaps, weights).T, strict=True):
        rows = np.repeat(np.arange(7), row.astype(int))
        again = threshold_free.compute_max_box_accuracies(overlaps[rows], np.ones((1, len(rows))))[:, 0]
        assert resampled == pytest.approx(again)


@pytest.mark.parametrize("scaling", ["min_max", "positive", "absolute"])
def test_pixel_precision_is_scikit_learns(scaling: str):
    maps, boxes = _draw(3)
    masks = np.zeros((7, SIZE, SIZE), np.uint8)
    for mask, (x, y, w, h) in zip(masks, boxes.astype(int), strict=True):
        mask[y : y + h, x : x + w] = 255
    pixels = threshold_free.count_pixels(maps, masks, SIZE, STRIDE, OFFSET, scaling=scaling)
    values = np.stack([np.floor(_stretch(cells, scaling) * 1000) for cells in maps])
    for keep in (np.ones(7, int), np.array([2, 0, 0, 1, 3, 0, 1])):
        rows = np.repeat(np.arange(7), keep)
        expected = average_precision_score((masks != 0)[rows].ravel(), values[rows].ravel())
        (got,) = threshold_free.compute_pixel_precision(*pixels, keep[None].astype(float))
        assert got == pytest.approx(expected, rel=1e-9)


def test_a_perfect_map_and_a_flat_one():
    boxes = np.array([[12.0, 12, 16, 16]])
    masks = np.zeros((1, SIZE, SIZE), bool)
    masks[0, 12:28, 12:28] = True
    pixels = threshold_free.count_pixels(masks.astype(float), masks, SIZE, 1, 0)  # a cell a pixel
    found = threshold_free.find_level_boxes(masks.astype(float), SIZE, 1, 0)
    options = {"num_resamples": 20, "seed": 0}
    overlaps = threshold_free.compute_best_overlaps(found, boxes)
    best = threshold_free.summarize_threshold_free(overlaps, pixels, np.zeros(1), **options)
    assert {name: value.estimate for name, value in best.items()} == {
        "max_box_acc_v2": 1, "max_box_acc_0.3": 1, "max_box_acc_0.5": 1, "max_box_acc_0.7": 1, "px_ap": 1
    }  # fmt: skip
    flat = np.full((1, 6, 6), 0.3)
    (detected, levels), *_ = threshold_free.find_level_boxes(flat, SIZE, STRIDE, OFFSET)
    assert len(detected) == len(levels) == 0
    pixels = threshold_free.count_pixels(flat, masks, SIZE, STRIDE, OFFSET)
    assert threshold_free.compute_pixel_precision(*pixels, np.ones((1, 1)))[0] == pytest.approx(masks.mean())  # chance


def test_a_large_image_is_scored_in_a_small_frame_as_well_as_in_its_own():
    maps, boxes = _draw(4, 3)
    maps = np.abs(maps) + 4 * np.exp(-np.sum((np.indices((6, 6)).T - 2.5) ** 2, axis=-1))
    large = 8 * boxes, 8 * SIZE, 8 * STRIDE, 8 * (OFFSET + 0.5) - 0.5
    overlaps = [
        threshold_free.compute_best_overlaps(threshold_free.find_level_boxes(maps, *large[1:]), large[0]),
        threshold_free.compute_best_overlaps(threshold_free.find_level_boxes(maps, SIZE, STRIDE, OFFSET), boxes),
    ]
    np.testing.assert_allclose(*(found.max(axis=1) for found in overlaps), atol=0.05)
    frame = threshold_free.reduce_frame(*large[1:], max_side=SIZE)
    assert frame == ((SIZE, SIZE), STRIDE, OFFSET, 1 / 8)


def test_intervals_are_of_patients():
    rng = np.random.default_rng(5)
    overlaps = rng.random((60, 100)) * 0.9
    options = {"num_resamples": 300, "seed": 1}
    single = threshold_free.summarize_threshold_free(overlaps, None, np.arange(60), **options)
    few = threshold_free.summarize_threshold_free(
        np.repeat(overlaps[:6], 10, axis=0), None, np.arange(60) // 10, **options
    )
    assert "px_ap" not in single
    for name, value in single.items():
        assert value.low < value.estimate < value.high
        assert few[name].high - few[name].low > value.high - value.low
