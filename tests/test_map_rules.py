"""Rules tuned on phantoms: all cuts at once as one by one, the best of them, and the speed that a run can afford."""

import json

import mass_twin
import numpy as np
import pytest

from cxa_jax import map_rules
from cxa_jax.boxes import compute_iou
from cxa_jax.heat_maps import Rule, detect_boxes, scale_map, upsample_maps
from cxa_jax.localization import score_maps
from cxa_jax.map_controls import draw_donors
from cxa_jax.map_mass import locate_mass
from cxa_jax.scored_maps import MAP_KINDS, derive_maps
from cxa_jax.threshold_free import reduce_frame
from cxa_jax.workdir import to_json

SIZE, STRIDE, OFFSET = 40, 8, 2
CANDIDATES = [
    Rule(kind, value, components) for components in map_rules.TUNED_COMPONENTS for kind, value in map_rules.CUTS
]


def _draw(seed: int, num_images: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(2, 15, (num_images, 2))
    maps = np.round(rng.random((num_images, 5, 5)), 1)  # with ties
    return maps, np.concatenate([corners, rng.uniform(8, 24, (num_images, 2))], axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_all_cuts_at_once_are_the_rules_one_by_one(seed: int):
    maps, _ = _draw(seed)
    for cells in [*maps, np.zeros((5, 5)), np.full((5, 5), 0.7)]:
        values = scale_map(upsample_maps(cells, SIZE, STRIDE, OFFSET), "unit")
        found = map_rules.detect_by_cuts(values).reshape(-1, 4)
        for box, rule in zip(found, CANDIDATES, strict=True):
            expected = detect_boxes(values, rule)
            assert box.tolist() == expected[0].tolist() if len(expected) else np.isnan(box).all()


def test_the_best_rule_has_the_highest_mean_overlap_of_all():
    maps, boxes = _draw(7)
    scalings = ("unit", "min_max")
    overlap = {}
    for scaling in scalings:
        scaled = [scale_map(upsample_maps(cells, SIZE, STRIDE, OFFSET), scaling) for cells in maps]
        for rule in [*CANDIDATES, *mass_twin.list_rules(scaled, boxes)]:
            overlap[rule._replace(scaling=scaling)] = _overlap(scaled, boxes, rule)
    best = map_rules.find_best_rule(maps, boxes, reduce_frame(SIZE, STRIDE, OFFSET), scalings)
    assert overlap[best] == pytest.approx(max(overlap.values()))
    assert len(set(np.round(list(overlap.values()), 6))) > 10


def _overlap(scaled: list[np.ndarray], boxes: np.ndarray, rule: Rule) -> float:
    pairs = zip(scaled, boxes, strict=True)
    return np.mean([compute_iou(detect_boxes(values, rule), box).max(initial=0) for values, box in pairs])


@pytest.mark.parametrize("power", map_rules.POWERS)
def test_shares_are_those_whose_places_lie_nearest_to_the_edges(power: float):
    rng = np.random.default_rng(int(power))
    maps, boxes = 0.05 + rng.random((7, 30, 36)), np.zeros((7, 4))
    for values, box in zip(maps, boxes, strict=True):
        box[:] = *rng.integers(2, 12, 2), *rng.integers(9, 18, 2)
        x, y, w, h = box.astype(int)
        values[y : y + h, x : x + w] += 3
    places = np.array([locate_mass(values**power, map_rules.SHARES) for values in maps])
    shares, mean_iou = map_rules.choose_shares(places, boxes)
    assert list(shares) == mass_twin.choose_shares(maps, boxes, power)
    assert mean_iou == pytest.approx(_overlap(maps, boxes, Rule("mass", power, shares=shares))) and mean_iou > 0.3
    places[:2] = np.nan  # maps that say nothing: no place, and misses
    shares, mean_iou = map_rules.choose_shares(places, boxes)
    assert list(shares) == mass_twin.choose_shares(maps[2:], boxes[2:], power)
    assert mean_iou == pytest.approx(5 / 7 * _overlap(maps[2:], boxes[2:], Rule("mass", power, shares=shares)))
    places[:] = np.nan
    assert map_rules.choose_shares(places, boxes) == ((0.25, 0.75, 0.25, 0.75), 0)


def test_maps_beside_all_of_their_places_give_shares_of_no_worth():
    """All mass left of the box: the nearest share is the last one for both edges, which make no box."""
    values = np.zeros((20, 20))
    values[8:12, 1:4] = 1
    places = locate_mass(values, map_rules.SHARES)[None]
    shares, mean_iou = map_rules.choose_shares(places, np.array([[12.0, 8, 6, 4]]))
    assert mean_iou == 0 and 0 < shares[0] < shares[1] < 1 and 0 < shares[2] < shares[3] < 1


def _draw_speckles(seed: int, num_images: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Return maps [N, 12, 12] whose mass lies in a box, in specks that touch nothing; and one speck away from it."""
    rng = np.random.default_rng(seed)
    maps, boxes = np.zeros((num_images, 12, 12)), np.zeros((num_images, 4))
    for cells, box in zip(maps, boxes, strict=True):
        row, column = rng.integers(1, 5, 2)
        cells[row : row + 7 : 2, column : column + 7 : 2] = rng.uniform(0.6, 0.9, (4, 4))
        box[:] = OFFSET + 8 * column - 4, OFFSET + 8 * row - 4, 56, 56
        cells[rng.choice([0, 11]), rng.choice([0, 11])] = 1
    return maps, boxes


def test_mass_is_chosen_where_it_is_best_and_keeps_what_it_promised():
    frame = reduce_frame(100, STRIDE, OFFSET)
    assert frame.scale < 1  # shares of a reduced frame, boxes of the whole one
    maps, boxes = _draw_speckles(0)
    best = map_rules.find_best_rule(maps, boxes, frame, ("unit", "min_max"))
    assert best.kind == "mass" and best.value in map_rules.POWERS and len(best.shares) == 4
    for drawn in ((maps, boxes), _draw_speckles(1)):  # what it was tuned on, and fresh ones
        scores = [
            score_maps(*drawn, np.arange(30), 100, STRIDE, OFFSET, rule, scaling="unit").iou.mean()
            for rule in (best, *CANDIDATES)
        ]
        assert scores[0] > 0.6 > max(scores[1:]) + 0.05


@pytest.mark.parametrize(
    "rule",
    [
        Rule("mass", 2.0, scaling="min_max", shares=(0.08, 0.91, 0.1, 0.87)),
        Rule("percentile", 92.5, "all", "positive"),
        Rule("wang", components="each"),
    ],
)
def test_rules_come_back_from_metrics_json_as_they_were(rule: Rule):
    facts = map_rules.MapRules({"evidence": rule}, "drawn").describe()
    back = map_rules.find_rules(None, json.loads(to_json(facts))["rules"]).rules
    assert back == {"evidence": rule} and hash(back["evidence"]) == hash(rule)
    values = np.random.default_rng(3).random((20, 20))
    np.testing.assert_array_equal(detect_boxes(values, back["evidence"]), detect_boxes(values, rule))


def test_what_the_cells_hide_is_found_by_the_right_rule():
    """A pattern that one rule alone reads well: magnitudes on two borders, with nothing between them."""
    rng = np.random.default_rng(1)
    maps, boxes = np.zeros((10, 8, 8)), np.zeros((10, 4))
    for cells, box in zip(maps, boxes, strict=True):
        left, right = rng.integers(1, 3), rng.integers(5, 7)
        cells[3:6, left], cells[3:6, right] = 1, -0.9
        box[:] = OFFSET + 8 * left - 3, OFFSET + 24 - 3, 8 * (right - left) + 7, 23
    frame = reduce_frame(64, STRIDE, OFFSET)
    both = map_rules.find_best_rule(maps, boxes, frame, ("positive", "absolute"))
    assert (both.components, both.scaling) == ("all", "absolute")


def test_donors_are_of_other_patients_and_drawn_from_the_seed():
    patients = np.array(["a", "b", "b", "c", "a", "d"])
    drawn = np.stack([draw_donors(patients, seed) for seed in range(40)])
    assert (patients[drawn] != patients).all()
    np.testing.assert_array_equal(drawn[3], draw_donors(patients, 3))
    for row, patient in enumerate(patients):
        assert set(drawn[:, row]) == set(np.flatnonzero(patients != patient))  # each of them can be drawn
    assert draw_donors(np.array(["a", "a"]), 0) is None


def test_maps_are_derived_from_what_the_network_has():
    rng = np.random.default_rng(2)
    attention, evidence = rng.random((3, 4, 4)), rng.normal(size=(3, 4, 4))
    derived = derive_maps({"attention": attention, "evidence": evidence})
    assert list(derived) == [
        "attention", "evidence", "evidence_absolute", "attended_evidence", "attended_evidence_absolute"
    ]  # fmt: skip
    np.testing.assert_allclose(derived["attended_evidence"], attention * evidence)
    np.testing.assert_array_equal(derived["evidence_absolute"], evidence)  # its scaling takes the magnitude
    assert MAP_KINDS["evidence_absolute"].scaling == "absolute"
    assert list(derive_maps({"evidence": evidence})) == ["evidence", "evidence_absolute"]
