"""Scores of maps and controls; the published control values on the real boxes."""

import csv
import math

import numpy as np
import pytest
from conftest import REAL
from quick import slow
from scipy import ndimage

from cxa_jax import heat_maps, localization
from cxa_jax.boxes import compute_coverage, scale_boxes
from cxa_jax.errors import UserError


def _draw_scene(seed: int, num_images: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw maps [N, 7, 7] of a smooth blob that lies in its box, at 224 px on DenseNet's grid."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(60, 150, (num_images, 2))
    sizes = rng.uniform(70, 100, (num_images, 2))
    pixels = 14 + 32 * np.arange(7)
    distance = (pixels[None, None, :] - centers[:, 0, None, None]) ** 2 / (sizes[:, 0, None, None] / 2) ** 2
    distance = distance + (pixels[None, :, None] - centers[:, 1, None, None]) ** 2 / (sizes[:, 1, None, None] / 2) ** 2
    boxes = np.concatenate([centers - sizes / 2, sizes], axis=1)
    return np.exp(-distance * np.log(2)), boxes, np.arange(num_images) // 2


def _score(maps: np.ndarray, boxes: np.ndarray, patients: np.ndarray, rule="half_max", **options):
    return localization.score_maps(maps, boxes, patients, 224, 32, 14, rule, **options)


def test_a_map_of_the_heart_beats_random_maps_and_overlaps_its_box():
    maps, boxes, patients = _draw_scene(1)
    scores = _score(maps, boxes, patients)
    assert scores.iou.mean() > 0.7 and scores.pointing.all() and np.all(scores.num_boxes == 1)
    assert scores.energy_ratio.min() > 1.5
    swapped = _score(maps.transpose(0, 2, 1), boxes[:, [1, 0, 3, 2]], patients)  # x and y are not mixed up
    assert swapped.iou == pytest.approx(scores.iou) and swapped.energy_ratio == pytest.approx(scores.energy_ratio)
    control = localization.score_controls(boxes, patients, 224, (7, 7), 32, 14, "half_max")["random_map"]
    assert control.iou.mean() < scores.iou.mean() - 0.2
    assert abs(control.energy_ratio.mean() - 1) < 0.2


def test_energy_is_the_share_in_the_box_over_the_boxs_share_and_one_for_a_flat_map():
    maps, boxes, patients = _draw_scene(2)
    flat = _score(np.full((12, 7, 7), 0.4), boxes, patients, scaling="unit")
    assert flat.energy_ratio == pytest.approx(1, abs=1e-9)
    values = localization.scale_map(localization.upsample_maps(maps[0], 224, 32, 14), "min_max")
    region = compute_coverage(boxes[0], 224, 224)
    expected = (values * region).sum() / values.sum() / (boxes[0, 2] * boxes[0, 3] / 224**2)
    assert _score(maps, boxes, patients).energy_ratio[0] == pytest.approx(expected)


def test_magnitudes_count_whichever_way_they_speak():
    maps, boxes, patients = _draw_scene(9)
    signed = maps * np.random.default_rng(9).choice([-1, 1], (12, 1, 1))
    absolute, same = (
        _score(signed, boxes, patients, scaling="absolute"),
        _score(maps, boxes, patients, scaling="absolute"),
    )
    for name, values in vars(same).items():
        np.testing.assert_array_equal(getattr(absolute, name), values)
    cut = _score(signed, boxes, patients, scaling="positive")
    negative = signed.sum((1, 2)) < 0
    assert 0 < negative.sum() < 12 and not cut.pointing[negative].any() and absolute.pointing.all()
    assert np.isnan(cut.energy_ratio[negative]).all() and absolute.energy_ratio.min() > 1.5


def test_several_rules_at_once_are_those_rules_one_by_one():
    maps, boxes, patients = _draw_scene(10)
    maps = 0.6 + 0.3 * maps
    mass = heat_maps.Rule("mass", 2.0, shares=(0.1, 0.9, 0.2, 0.8))
    rules = ["wang", "half_max", "p85_all", 0.7, mass, heat_maps.Rule("level", 0.5, scaling="min_max")]
    together = localization.score_maps_by_rules(maps, boxes, patients, 224, 32, 14, rules, scaling="unit")
    for rule, found in zip(rules, together, strict=True):
        alone = _score(maps, boxes, patients, rule, scaling="unit")
        for name, values in vars(alone).items():
            np.testing.assert_array_equal(getattr(found, name), values)
    stretched = _score(maps, boxes, patients, 0.5, scaling="min_max")
    np.testing.assert_array_equal(together[-1].iou, stretched.iou)  # its boxes are of the stretched map
    np.testing.assert_array_equal(together[-1].energy_ratio, together[0].energy_ratio)  # its energy is not


def test_energy_over_a_heart_mask():
    maps, boxes, patients = _draw_scene(3)
    masks = np.zeros((12, 224, 224, 1), np.uint8)
    for mask, (x, y, w, h) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y : y + h, x : x + w] = 255
    scores = _score(maps, boxes.round(), patients, heart_masks=masks[..., 0])
    assert scores.heart_energy_ratio == pytest.approx(scores.energy_ratio)
    assert np.isnan(_score(maps, boxes, patients).heart_energy_ratio).all()
    with pytest.raises(UserError, match="heart_masks have shape"):
        _score(maps, boxes, patients, heart_masks=masks)


@pytest.mark.parametrize(("scaling", "value"), [("min_max", 0.7), ("unit", 0.0), ("positive", -2.0)])
def test_an_empty_map_is_a_miss(scaling: str, value: float):
    _, boxes, patients = _draw_scene(4)
    scores = _score(np.full((12, 7, 7), value), boxes, patients, scaling=scaling)
    assert not (scores.iou.any() or scores.iobb.any() or scores.pointing.any() or scores.false_positives.any())
    assert np.isnan(scores.predicted).all() and np.isnan(scores.energy_ratio).all()
    summary = localization.summarize(scores, num_resamples=50)
    assert summary["miss_rate"].estimate == 1 and summary["mean_iou"].estimate == 0
    assert math.isnan(summary["energy_ratio"].estimate)


def test_wangs_rule_counts_every_component_as_hit_or_false_positive():
    maps = np.zeros((1, 7, 7))
    maps[0, 2, 2], maps[0, 5, 5] = 1, 0.5  # the second is above 60 / 255 alone
    scores = _score(maps, np.array([[50.0, 50, 56, 56]]), np.zeros(1), "wang", scaling="unit")
    assert scores.num_boxes == 3 and scores.iobb == 1
    assert scores.false_positives.tolist() == [[1, 1, 1, 1, 1]]
    single = _score(maps, np.array([[50.0, 50, 56, 56]]), np.zeros(1), "half_max", scaling="unit")
    assert single.num_boxes == 1 and single.predicted.tolist() == [[62, 62, 33, 33]]
    away = _score(maps, np.array([[150.0, 150, 50, 50]]), np.zeros(1), "wang", scaling="unit")
    assert away.false_positives.tolist() == [[2, 2, 2, 2, 2]] and away.pointing == 0


@pytest.mark.parametrize("offset", [0, 14, 37])
def test_pointing_looks_at_the_strongest_cells_centre(offset: int):
    cells = np.zeros((5, 5))
    cells[1, 3] = 2
    x, y = offset + 96, offset + 32
    for box, hit in [((x - 1, y - 1, 3, 3), 1), ((x + 1, y - 1, 9, 9), 0), ((x - 9, y - 9, 9, 30), 0)]:
        assert localization.compute_pointing(cells, np.array(box), 32, offset) == hit
    cells[4, 0] = 2  # a tie with a cell outside counts half
    assert localization.compute_pointing(cells, np.array((x - 1, y - 1, 3, 3)), 32, offset) == 0.5


@pytest.mark.parametrize("rule", ["half_max", "wang", "p85_all", heat_maps.Rule("mass", 1.0, shares=(0.2, 0.7) * 2)])
def test_the_found_box_points_at_its_own_centre(rule):
    maps, boxes, patients = _draw_scene(11)
    maps = np.roll(maps, (1, 1), axis=(1, 2))  # so that some miss
    maps[0] = 0.5  # nothing is found
    scores = _score(maps, boxes, patients, rule, scaling="unit")
    x, y = (scores.predicted[:, :2] + scores.predicted[:, 2:] / 2).T
    inside = (boxes[:, 0] <= x) & (x < boxes[:, 0] + boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 1] + boxes[:, 3])
    assert scores.box_pointing.tolist() == inside.astype(float).tolist()
    assert np.isnan(x[0]) and 0 < inside[1:].sum()
    assert localization.summarize(scores, num_resamples=10)["box_pointing"].estimate == pytest.approx(inside.mean())
    given = localization.score_boxes(scores.predicted, boxes, patients)  # of which nothing else points
    np.testing.assert_array_equal(given.pointing[1:], scores.box_pointing[1:])
    np.testing.assert_array_equal(given.pointing, given.box_pointing)
    assert np.isnan(given.box_pointing[0])  # nothing was said


def test_the_box_does_not_depend_on_the_image_size_when_maps_and_boxes_grow_alike():
    maps, boxes, patients = _draw_scene(5, 4)
    small = _score(maps, boxes, patients)
    large = localization.score_maps(maps, 2 * boxes, patients, 448, 64, 28.5, "half_max")
    assert large.iou == pytest.approx(small.iou, abs=0.02)


def test_summary_equals_means_and_takes_subsets():
    maps, boxes, patients = _draw_scene(6)
    scores = _score(maps, boxes, patients)
    summary = localization.summarize(scores, num_resamples=200, seed=3)
    assert summary["mean_iou"].estimate == pytest.approx(scores.iou.mean())
    assert summary["accuracy_iou_0.7"].estimate == pytest.approx(np.mean(scores.iou > 0.7))
    assert summary["accuracy_iobb_0.9"].estimate == pytest.approx(np.mean(scores.iobb > 0.9))
    assert summary["false_positives_iobb_0.9"].estimate == pytest.approx(scores.false_positives[:, 4].mean())
    assert summary["mean_iou"].low < summary["mean_iou"].estimate < summary["mean_iou"].high
    assert math.isnan(summary["heart_energy_ratio"].estimate)
    half = scores.subset(np.arange(12) < 6)
    assert len(half) == 6 and localization.summarize(half)["mean_iou"].estimate == pytest.approx(scores.iou[:6].mean())
    nothing = localization.summarize(scores.subset(np.zeros(12, bool)), num_resamples=10)
    assert math.isnan(nothing["mean_iou"].estimate)


def _heart_boxes() -> tuple[np.ndarray, np.ndarray]:
    path = REAL / "chestxray14_meta" / "BBox_List_2017.csv"
    if not path.exists():
        pytest.skip(f"the NIH box list is not here: {path}")
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[1] == "Cardiomegaly"]
    return np.array([row[2:6] for row in rows], float), np.array([row[0].split("_")[0] for row in rows])


def test_controls_on_the_real_boxes_are_the_known_ones():
    boxes, patients = _heart_boxes()
    assert (len(boxes), len(np.unique(patients))) == (146, 128)
    controls = localization.score_controls(scale_boxes(boxes, 1024, 224), patients, 224, (7, 7), 32, 14, "half_max")
    summary = localization.summarize(controls["median_box"], num_resamples=500)
    assert round(summary["mean_iou"].estimate, 3) == 0.639
    assert summary["mean_iou"].low < 0.63 and summary["mean_iou"].high > 0.65
    accuracy = [round(summary[f"accuracy_iou_{threshold:g}"].estimate, 3) for threshold in localization.IOU_THRESHOLDS]
    assert accuracy == [1, 1, 0.993, 0.952, 0.829, 0.644, 0.377]
    assert summary["pointing"].estimate == 1
    centre = localization.summarize(controls["image_centre"], num_resamples=10)
    assert round(centre["pointing"].estimate, 3) == 0.973 and math.isnan(centre["mean_iou"].estimate)
    assert math.isnan(centre["miss_rate"].estimate)
    random_map = localization.summarize(controls["random_map"], num_resamples=10)
    assert random_map["mean_iou"].estimate < 0.5 and abs(random_map["energy_ratio"].estimate - 1) < 0.05


@pytest.mark.parametrize(("cells", "known"), [(7, 0.709), slow(5, 0.634), slow(32, 0.930), (30, 0.922)])
def test_what_whole_cells_can_say_of_the_real_boxes(cells, known):
    boxes, patients = _heart_boxes()
    controls = localization.score_controls(boxes, patients, 1024, (cells, cells), 32, 14, "half_max")
    assert round(localization.summarize(controls["grid_box"], num_resamples=10)["mean_iou"].estimate, 3) == known


def test_the_random_map_is_scaled_as_asked():
    maps, boxes, patients = _draw_scene(8)
    arguments = boxes, patients, 224, (7, 7), 32, 14, 0.9
    unit, stretched = (
        localization.score_controls(*arguments, scaling=scaling, seed=3)["random_map"]
        for scaling in ("unit", "min_max")
    )
    expected = _score(np.random.default_rng(3).random(maps.shape), boxes, patients, 0.9, scaling="unit")
    np.testing.assert_array_equal(unit.iou, expected.iou)
    assert np.any(unit.iou != stretched.iou)


def test_the_grid_limits_the_overlap_as_known():
    boxes, patients = (column[::8] for column in _heart_boxes())
    centers = 14 + 32 * np.arange(32) + 0.5
    inside_x = (centers >= boxes[:, :1]) & (centers < boxes[:, :1] + boxes[:, 2:3])
    inside_y = (centers >= boxes[:, 1:2]) & (centers < boxes[:, 1:2] + boxes[:, 3:])
    maps = (inside_y[:, :, None] & inside_x[:, None, :]).astype(float)
    scores = localization.score_maps(maps, boxes, patients, 1024, 32, 14, "half_max")
    assert scores.iou.mean() == pytest.approx(0.930, abs=0.03)  # the best that 32x32 cells can do


def test_inputs_that_do_not_fit_are_named():
    maps, boxes, patients = _draw_scene(7)
    with pytest.raises(UserError, match=r"\(11, 7, 7\), \(12, 4\)"):
        _score(maps[1:], boxes, patients)
    with pytest.raises(UserError, match=r"scale_boxes\(boxes, 1024, 224\)"):
        _score(maps, 4 * boxes, patients)
    maps[3, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"maps\[3\] holds nan"):
        _score(maps, boxes, patients)


def test_upsampled_maps_agree_with_a_filter_of_the_image():
    """A bilinear map is the low-resolution map spread by triangles: the same mass, hence the same energy."""
    maps, boxes, patients = _draw_scene(8, 1)
    spread = np.zeros((224 + 128, 224 + 128))
    for row in range(7):
        for column in range(7):
            spread[64 + 14 + 32 * row, 64 + 14 + 32 * column] = maps[0, row, column]
    triangle = 1 - np.abs(np.arange(-31, 32)) / 32
    image = ndimage.convolve(spread, np.outer(triangle, triangle), mode="constant")[64:-64, 64:-64]
    aligned = localization.upsample_maps(maps[0], 224, 32, 14)
    assert aligned[14:207, 14:207] == pytest.approx(image[14:207, 14:207], abs=1e-12)
