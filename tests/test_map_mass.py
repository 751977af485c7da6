"""Boxes by shares of a map's mass: a twin in plain loops, boxes that are known, what moves them, what is refused."""

import mass_twin
import numpy as np
import pytest

from cxa_jax import heat_maps
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import Rule, detect_boxes
from cxa_jax.localization import score_maps_by_rules
from cxa_jax.map_mass import locate_mass

SHARES = (0.12, 0.83, 0.07, 0.9)


def _mass(power: float = 1.0, shares: tuple[float, ...] = SHARES) -> Rule:
    return Rule("mass", power, shares=shares)


def _draw_blob(rng: np.random.Generator, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Return a speckled blob within zeros, 12 px from any side."""
    values = np.zeros(size)
    values[12:-12, 12:-12] = rng.random((size[0] - 24, size[1] - 24)) * (rng.random(size)[12:-12, 12:-12] < 0.5)
    return values


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_box_is_that_of_plain_loops(power: float, seed: int):
    rng = np.random.default_rng(seed)
    for values in (rng.random((9, 14)), _draw_blob(rng), 1e-3 * rng.random((14, 9)) ** 8):  # faint and peaked
        shares = np.sort(rng.uniform(0.01, 0.99, (2, 2)), axis=1).ravel()
        (found,) = detect_boxes(values, _mass(power, tuple(shares)))
        np.testing.assert_allclose(found, mass_twin.enclose_mass(values, power, shares), rtol=1e-10)
        y, x = locate_mass(values**power, shares)
        columns, rows = mass_twin.find_profiles(values, power)
        np.testing.assert_allclose(x, [mass_twin.find_edge(columns, share) for share in shares], rtol=1e-10)
        np.testing.assert_allclose(y, [mass_twin.find_edge(rows, share) for share in shares], rtol=1e-10)


@pytest.mark.parametrize("power", [1, 3])
def test_all_of_the_mass_of_a_box_is_that_box(power: float):
    rng = np.random.default_rng(5)
    for _ in range(5):
        x, y, w, h = *rng.integers(0, 20, 2), *rng.integers(3, 20, 2)
        values = np.zeros((48, 44))
        values[y : y + h, x : x + w] = 1
        for rest in (1e-9, 0.1):  # what is cut off at each edge, of a box filled evenly
            (found,) = detect_boxes(values, _mass(power, (rest, 1 - rest) * 2))
            expected = [x + rest * w, y + rest * h, (1 - 2 * rest) * w, (1 - 2 * rest) * h]
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_power_raises_the_map_and_weakens_what_is_weak_everywhere():
    rng = np.random.default_rng(6)
    values = rng.random((20, 30))
    np.testing.assert_allclose(detect_boxes(values, _mass(3)), detect_boxes(values**3, _mass(1)))
    veiled = np.full((40, 40), 0.3)
    veiled[10:18, 22:34] = 1
    errors = [
        np.abs(detect_boxes(veiled, _mass(power, (0.01, 0.99) * 2))[0] - [22, 10, 12, 8]).max() for power in (1, 4, 8)
    ]
    assert errors[0] > 10 > 3 > errors[2] and errors[0] > errors[1] > errors[2]
    faint = 1e-4 * values  # no power makes it vanish, and scale has no say
    np.testing.assert_allclose(detect_boxes(faint, _mass(200)), detect_boxes(values, _mass(200)))


def test_the_box_moves_continuously_where_a_threshold_jumps():
    rng = np.random.default_rng(7)
    first, last = 0.05 + rng.random((2, 24, 24))
    steps = np.linspace(0, 1, 2001)
    walk = [(1 - t) * first + t * last for t in steps]
    boxes = np.concatenate([detect_boxes(values, _mass(2)) for values in walk])
    moved = np.abs(np.diff(boxes, axis=0))
    assert moved.max() < 0.02 and np.abs(boxes[-1] - boxes[0]).max() > 0.3
    jumping = np.concatenate([detect_boxes(values, "p90") for values in walk])
    assert np.abs(np.diff(jumping, axis=0)).max() >= 1
    # a spot far from the place moves the edges by as much as its share, not to itself
    values = np.zeros((40, 40))
    values[10:20, 10:20] = 1
    spot = values.copy()
    spot[38, 38] = 1
    before, after = (detect_boxes(each, _mass(1, (0.05, 0.95) * 2))[0] for each in (values, spot))
    assert 0 < np.abs(after - before).max() < 0.15
    assert detect_boxes(spot, Rule("half_max", components="all"))[0].tolist() == [10, 10, 29, 29]


@pytest.mark.parametrize("shift", [(3, -5), (-12, 12), (0, 1)])
def test_the_box_goes_with_the_map(shift: tuple[int, int]):
    values = _draw_blob(np.random.default_rng(8))
    (box,) = detect_boxes(values, _mass(2))
    (moved,) = detect_boxes(np.roll(values, shift, axis=(0, 1)), _mass(2))
    np.testing.assert_allclose(moved, box + [shift[1], shift[0], 0, 0], atol=1e-9)


def test_mirrored_and_transposed_maps_give_mirrored_and_transposed_boxes():
    values = _draw_blob(np.random.default_rng(9))
    (x, y, w, h), (left, right, top, bottom) = detect_boxes(values, _mass())[0], SHARES
    (mirrored,) = detect_boxes(values[:, ::-1], _mass(shares=(1 - right, 1 - left, top, bottom)))
    np.testing.assert_allclose(mirrored, [values.shape[1] - x - w, y, w, h], atol=1e-9)
    (transposed,) = detect_boxes(values.T, _mass(shares=(top, bottom, left, right)))
    np.testing.assert_allclose(transposed, [y, x, h, w], atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_map_of_one_value_is_a_miss(value: float):
    assert detect_boxes(np.full((20, 20), value), _mass()).shape == (0, 4)
    noise = np.random.default_rng(0).uniform(-1e-15, 1e-15, (20, 20))
    assert detect_boxes(np.full((20, 20), value) * (1 + noise), _mass()).shape == (0, 4)
    maps, boxes = np.full((2, 4, 4), value), np.array([[2.0, 2, 20, 20]] * 2)
    (scores,) = score_maps_by_rules(maps, boxes, np.arange(2), 32, 8, 4, [_mass()], scaling="unit")
    assert not scores.iou.any() and not scores.box_pointing.any() and not scores.num_boxes.any()
    assert np.isnan(scores.predicted).all()


def test_its_box_points_where_the_weight_lies_and_the_map_at_its_peak():
    cells = np.zeros((2, 8, 8))
    cells[:, 2:6, 1:4] = 0.6  # the weight
    cells[:, 7, 7] = 1  # the peak
    boxes = np.array([[8.0, 16, 24, 32], [48, 48, 16, 16]])  # about the weight, about the peak
    rule = _mass(1, (0.1, 0.8) * 2)  # the peak is an eighth of the mass
    mass, peak = score_maps_by_rules(cells, boxes, np.arange(2), 64, 8, 4, [rule, "half_max"], scaling="unit")
    assert mass.box_pointing.tolist() == [1, 0] and mass.pointing.tolist() == peak.pointing.tolist() == [0, 1]
    assert peak.box_pointing.tolist() == [1, 0]  # its largest component is no peak
    np.testing.assert_array_equal(mass.energy_ratio, peak.energy_ratio)
    assert mass.iou[0] > 0.6 and mass.num_boxes.tolist() == [1, 1]


@pytest.mark.parametrize(
    "rule",
    [
        "mass",
        Rule("mass", 1.0),
        _mass(0.0),
        _mass(-1.0),
        _mass(float("nan")),
        _mass(shares=(0.1, 0.9, 0.1)),
        _mass(shares=(0.1, 0.9, 0.1, 0.9, 0.95)),
        _mass(shares=(0.9, 0.1, 0.1, 0.9)),
        _mass(shares=(0.1, 0.9, 0.5, 0.5)),
        _mass(shares=(0.0, 0.9, 0.1, 0.9)),
        _mass(shares=(0.1, 0.9, 0.1, 1.0)),
        _mass(shares=(0.1, float("nan"), 0.1, 0.9)),
        _mass()._replace(components="two"),
        Rule("masses", 1.0, shares=SHARES),
    ],
)
def test_shares_and_powers_that_make_no_box_are_refused(rule: Rule | str):
    assert heat_maps.make_rule(_mass(4.0)) == _mass(4.0)
    with pytest.raises(UserError, match="unknown threshold rule .* 'mass' with four shares"):
        detect_boxes(np.random.default_rng(0).random((5, 5)), rule)


def test_it_cuts_no_mask():
    with pytest.raises(UserError, match="'mass' cuts no mask off a map"):
        heat_maps.threshold_map(np.random.default_rng(1).random((5, 5)), _mass())


def test_it_is_said_in_words():
    assert heat_maps.describe_rule(_mass()) == (
        "edges at 12% and 83% of the map's mass from the left, 7% and 90% from the top"
    )
    said = heat_maps.describe_rule(_mass(2.0)._replace(scaling="min_max"))
    assert "mass to the power 2 from" in said and said.endswith(", scaled min_max")
