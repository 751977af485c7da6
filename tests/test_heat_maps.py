"""From map to boxes: registration of cells, scaling, threshold rules, components."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from cxa_jax import heat_maps
from cxa_jax.errors import UserError

# (offset, cells) of DenseNet, ResNet-50 and Inception-ResNet-v2 at 224 px, stride 32.
GRIDS = [(14, 7), (0, 7), (37, 5)]


@pytest.mark.parametrize(("offset", "num_cells"), GRIDS)
def test_a_blob_in_a_cell_lands_on_its_pixel(offset: int, num_cells: int):
    rng = np.random.default_rng(offset)
    for _ in range(5):
        row, column = rng.integers(1, num_cells - 1, 2)  # inside: the blob is whole
        cells = np.zeros((num_cells, num_cells))
        cells[row, column] = 1
        image = heat_maps.upsample_maps(cells, 224, 32, offset)
        assert np.unravel_index(image.argmax(), image.shape) == (offset + 32 * row, offset + 32 * column)
        assert ndimage.center_of_mass(image) == pytest.approx((offset + 32 * row, offset + 32 * column), abs=1e-9)
        x, y, w, h = heat_maps.detect_boxes(image, "half_max")[0]
        assert (x + (w - 1) / 2, y + (h - 1) / 2) == (offset + 32 * column, offset + 32 * row)
        assert abs(w - 33) <= 1 and w == h


@pytest.mark.parametrize(("offset", "num_cells"), GRIDS)
def test_upsampling_reads_the_map_at_pixel_minus_offset_over_stride(offset: int, num_cells: int):
    cells = np.random.default_rng(1).normal(size=(3, num_cells, num_cells + 2))
    image = heat_maps.upsample_maps(cells, (224, 300), 32, offset)
    grid = np.meshgrid((np.arange(224) - offset) / 32, (np.arange(300) - offset) / 32, indexing="ij")
    for values, source in zip(image, cells, strict=True):
        expected = ndimage.map_coordinates(source, grid, order=1, mode="nearest")
        assert values == pytest.approx(expected, abs=1e-12)


def test_one_cell_is_constant_and_a_naive_resize_is_elsewhere():
    assert np.all(heat_maps.upsample_maps([[0.3]], 50, 32, 37) == 0.3)
    cells = np.zeros((5, 5))
    cells[3, 3] = 1
    aligned = heat_maps.upsample_maps(cells, 224, 32, 37)
    naive = cv2.resize(cells, (224, 224), interpolation=cv2.INTER_LINEAR)
    assert ndimage.center_of_mass(naive)[0] - ndimage.center_of_mass(aligned)[0] > 20  # px of 224


def test_scalings():
    values = np.array([[-1.0, 0.0], [1.0, 3.0]])
    assert heat_maps.scale_map(values, "min_max").tolist() == [[0, 0.25], [0.5, 1]]
    assert heat_maps.scale_map(values, "positive") == pytest.approx(np.array([[0, 0], [1 / 3, 1]]))
    faint = np.array([[0.1, 0.2]])
    assert np.array_equal(heat_maps.scale_map(faint, "unit"), faint)
    assert heat_maps.scale_map(-values, "absolute") == pytest.approx(np.array([[1 / 3, 0], [1 / 3, 1]]))
    for scaling in ("min_max", "positive"):
        assert not heat_maps.scale_map(np.full((2, 2), -0.5), scaling).any()
    assert not heat_maps.scale_map(np.zeros((2, 2)), "absolute").any()
    assert not heat_maps.scale_map(np.array([[0.1 + 0.2, 0.3]]), "min_max").any()  # rounding is no contrast
    with pytest.raises(UserError, match=r"spans \[-1, 3\]"):
        heat_maps.scale_map(values, "unit")
    with pytest.raises(UserError, match="unknown scaling 'max'"):
        heat_maps.scale_map(values, "max")


def test_the_log_odds_of_w_are_stretched():
    rng = np.random.default_rng(11)
    z = rng.normal(0, 3, (12, 15))
    values = 1 / (1 + np.exp(-z))
    expected = (z - z.min()) / (z.max() - z.min())
    np.testing.assert_allclose(heat_maps.scale_map(values, "logit"), expected, rtol=1e-9, atol=1e-12)
    ends = np.array([[0.0, 1e-7, 0.5, 1.0]])  # beyond 1e-6 of an end nothing is told apart, and nothing is infinite
    assert heat_maps.scale_map(ends, "logit") == pytest.approx(np.array([[0, 0, 0.5, 1]]))
    for value in (0.0, 0.3, 1.0):
        assert not heat_maps.scale_map(np.full((3, 3), value), "logit").any()
    for broken in (values + 0.5, values - 0.5):
        with pytest.raises(UserError, match="'logit' is for maps in .0, 1.; this one spans"):
            heat_maps.scale_map(broken, "logit")


def test_otsu_equals_opencv():
    rng = np.random.default_rng(2)
    for _ in range(20):
        cells = rng.random((6, 6)) ** rng.uniform(0.3, 4)
        levels = np.round(255 * heat_maps.scale_map(heat_maps.upsample_maps(cells, 160, 32, 0), "min_max"))
        expected, mask = cv2.threshold(levels.astype(np.uint8), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        assert heat_maps.compute_otsu_level(levels.astype(np.uint8)) == expected
        assert np.array_equal(heat_maps.threshold_map(levels / 255, "otsu")[0], mask > 0)


def test_threshold_rules():
    values = np.array([[0.0, 0.2, 0.3, 0.6, 0.75]])
    masks = {rule: heat_maps.threshold_map(values, rule) for rule in ("wang", "half_max", 0.25)}
    assert [mask.sum() for mask in masks["wang"]] == [3, 1]  # 60 / 255 = .235, 180 / 255 = .706
    assert masks["half_max"][0].sum() == 2 and masks[0.25][0].sum() == 3
    unknown = ("mean", 1.5, "1.5", "nan", "mass", "p", "p0", "p100", "p1.2.3", "p85_most")
    for rule in (*unknown, heat_maps.Rule("level", 0.5, "two")):
        with pytest.raises(UserError, match="unknown threshold rule"):
            heat_maps.threshold_map(values, rule)


def test_short_forms_of_rules():
    assert heat_maps.make_rule("p85") == heat_maps.Rule("percentile", 85, "largest")
    assert heat_maps.make_rule("p97.5_all") == heat_maps.Rule("percentile", 97.5, "all")
    assert heat_maps.make_rule(0.3) == heat_maps.make_rule("0.3") == heat_maps.Rule("level", 0.3)
    with pytest.raises(UserError, match="rule '85'; known are .* such as 0.3, .* such as p85, .* as p85_all"):
        heat_maps.make_rule("85")
    assert heat_maps.make_rule(heat_maps.make_rule("wang")).components == "each"
    said = [heat_maps.describe_rule(heat_maps.make_rule(rule)) for rule in ("p85_all", 0.95, "wang")]
    assert said == [
        "percentile 85, one box about all components", "level 0.95, largest component",
        "60 and 180 of 255, every component",
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [*heat_maps.RULES, 0.3, "p85", "p40_all"])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_map_of_one_value_has_no_box(rule: str | float, value: float):
    assert heat_maps.detect_boxes(np.full((20, 20), value), rule).shape == (0, 4)
    noise = np.random.default_rng(0).uniform(-1e-15, 1e-15, (20, 20))  # what interpolating leaves of it
    assert heat_maps.detect_boxes(np.full((20, 20), value) * (1 + noise), rule).shape == (0, 4)


@pytest.mark.parametrize("percentile", [50, 85, 97.5])
def test_a_percentile_leaves_that_share_of_untied_pixels(percentile: float):
    values = np.random.default_rng(4).permutation(1600).reshape(40, 40) / 1600
    (mask,) = heat_maps.threshold_map(values, f"p{percentile}")
    assert mask.sum() == round(16 * (100 - percentile)) and values[mask].min() > values[~mask].max()


def test_percentiles_take_ties_whole_or_leave_them():
    values = np.zeros((10, 10))
    values[2, 2:8] = 0.5
    assert heat_maps.threshold_map(values, "p60")[0].sum() == 6  # the percentile is 0, and 0 is not above it
    values[5:] = 1  # half of the map is its maximum, beyond the 85th percentile
    assert heat_maps.threshold_map(values, "p85")[0].sum() == 50
    assert heat_maps.detect_boxes(values, "p85").tolist() == [[0, 5, 10, 5]]
    many = heat_maps.cut_percentiles(values, [30, 60, 85])
    for mask, percentile in zip(many, (30, 60, 85), strict=True):
        assert np.array_equal(mask, heat_maps.threshold_map(values, f"p{percentile}")[0])


def test_components_are_eight_connected_and_sorted_by_pixels():
    mask = np.zeros((20, 30), bool)
    mask[2, 3] = mask[3, 4] = mask[4, 5] = True  # a diagonal is one component of 3 pixels
    mask[10:12, 20:24] = True  # 8 pixels
    mask[17, 0:9] = True  # 9 pixels
    expected = [[0, 17, 9, 1], [20, 10, 4, 2], [3, 2, 3, 3]]
    assert heat_maps.find_boxes(mask).tolist() == expected
    count, labels, found, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    by_size = sorted(found[1:].tolist(), key=lambda row: -row[4])
    assert heat_maps.find_boxes(mask).tolist() == [row[:4] for row in by_size]
    assert heat_maps.detect_boxes(mask.astype(float), 0.5).tolist() == expected[:1]
    assert len(heat_maps.detect_boxes(mask.astype(float), "wang")) == 6
    assert heat_maps.detect_boxes(mask.astype(float), heat_maps.Rule("level", 0.5, "all")).tolist() == [[0, 2, 24, 16]]
    assert heat_maps.detect_boxes(mask.astype(float), heat_maps.Rule("level", 0.5, "each")).tolist() == expected


def test_stacked_components_and_enclosing_boxes_are_opencvs():
    rng = np.random.default_rng(5)
    masks = rng.random((12, 15, 22)) < rng.uniform(0, 0.5, (12, 1, 1))
    masks[3] = False
    boxes, layers, sizes = heat_maps.find_stacked_boxes(masks)
    around = heat_maps.enclose(masks)
    for layer, mask in enumerate(masks.astype(np.uint8)):
        _, _, found, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        own = np.column_stack([boxes, sizes])[layers == layer]
        assert sorted(own.tolist()) == sorted(found[1:].tolist())
        if mask.any():
            assert around[layer].tolist() == list(cv2.boundingRect(mask))
    assert np.isnan(around[3]).all() and not (layers == 3).any()
