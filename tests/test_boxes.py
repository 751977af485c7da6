"""Boxes: overlap against counted pixels, coverage, frames, and the median box of the other patients."""

import numpy as np
import pytest

from cxa_jax import boxes
from cxa_jax.errors import UserError


def _draw_boxes(seed: int, num_boxes: int = 40, size_px: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, size_px, (num_boxes, 2, 2)), axis=1)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0] + 1], axis=1).astype(float)


def _pixels(box: np.ndarray, size_px: int = 64) -> np.ndarray:
    x, y, w, h = box.astype(int)
    mask = np.zeros((size_px, size_px), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def test_overlaps_equal_counted_pixels():
    detected, truth = _draw_boxes(1), _draw_boxes(2)
    iou, iobb = boxes.compute_iou(detected, truth), boxes.compute_iobb(detected, truth)
    for row in range(len(truth)):
        a, b = _pixels(detected[row]), _pixels(truth[row])
        assert iou[row] == pytest.approx((a & b).sum() / (a | b).sum())
        assert iobb[row] == pytest.approx((a & b).sum() / a.sum())
    assert boxes.compute_iou(truth, truth) == pytest.approx(1)


def test_an_empty_detection_overlaps_nothing():
    assert boxes.compute_iou([np.nan] * 4, [0, 0, 3, 3]) == 0
    assert boxes.compute_iobb([np.nan] * 4, [0, 0, 3, 3]) == 0


def test_coverage_counts_shares_of_pixels():
    coverage = boxes.compute_coverage([1.25, 0, 1.5, 2.5], 4, 5)
    assert coverage[0].tolist() == [0, 0.75, 0.75, 0, 0] and coverage[2, 1] == pytest.approx(0.375)
    assert coverage.sum() == pytest.approx(1.5 * 2.5)
    whole = _draw_boxes(3)[0]
    assert np.array_equal(boxes.compute_coverage(whole, 64, 64), _pixels(whole))


def test_overlap_does_not_depend_on_the_frame():
    detected, truth = _draw_boxes(4), _draw_boxes(5)
    small = [boxes.scale_boxes(array, 1024, 224) for array in (detected, truth)]
    assert boxes.compute_iou(*small) == pytest.approx(boxes.compute_iou(detected, truth))


def test_points_on_left_and_top_edges_are_inside():
    inside = boxes.contains([2, 3, 4, 5], [2, 6, 5.9, 4], [3, 4, 7.9, 8])
    assert inside.tolist() == [True, False, True, False]


def test_the_median_box_never_uses_the_own_patient():
    truth, patients = _draw_boxes(6, 9), np.array([0, 0, 1, 2, 2, 2, 3, 4, 5])
    medians = boxes.compute_median_boxes(truth, patients)
    moved = truth.copy()
    moved[3:6] += 100
    again = boxes.compute_median_boxes(moved, patients)
    assert np.array_equal(again[3:6], medians[3:6]) and not np.array_equal(again[0], medians[0])
    others = truth[patients != 2]
    assert medians[4, 0] + medians[4, 2] == np.median(others[:, 0] + others[:, 2])  # edges, not widths
    assert np.isnan(boxes.compute_median_boxes(truth[:2], [7, 7])).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([500, 400, 300, 200], r"boxes\[1\].*scale_boxes\(boxes, 1024, 224\)"),
        ([5, 4, 0, 20], r"boxes\[1\]"),
        ([5, 4, np.nan, 20], r"boxes\[1\]"),
    ],
)
def test_impossible_boxes_are_named(box: list[float], message: str):
    with pytest.raises(UserError, match=message):
        boxes.check_boxes([[1, 1, 5, 5], box], 224, 224)
    with pytest.raises(UserError, match=r"\(4,\)"):
        boxes.check_boxes(box, 224, 224)


def test_boxes_in_whole_cells():
    given = [[90, 10, 100, 220], [70, 65, 20, 10]]
    rounded = boxes.round_boxes(given, (4, 8), (256, 512))
    assert rounded.tolist() == [[64, 0, 128, 256], [64, 64, 64, 64]]  # of the second a cell is left: that of its centre
