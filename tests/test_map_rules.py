"""Rules tuned on phantoms: all cuts at once as one by one, the best of them, and the speed that a run can afford."""

import numpy as np
import pytest

from cxa_jax import map_rules
from cxa_jax.boxes import compute_iou
from cxa_jax.heat_maps import Rule, detect_boxes, scale_map, upsample_maps
from cxa_jax.map_controls import draw_donors
from cxa_jax.scored_maps import MAP_KINDS, derive_maps
from cxa_jax.threshold_free import reduce_frame

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
        for rule in CANDIDATES:
            ious = []
            for cells, box in zip(maps, boxes, strict=True):
                values = scale_map(upsample_maps(cells, SIZE, STRIDE, OFFSET), scaling)
                ious.append(compute_iou(detect_boxes(values, rule), box).max(initial=0))
            overlap[rule._replace(scaling=scaling)] = np.mean(ious)
    best = map_rules.find_best_rule(maps, boxes, reduce_frame(SIZE, STRIDE, OFFSET), scalings)
    assert overlap[best] == pytest.approx(max(overlap.values()))
    assert len(set(np.round(list(overlap.values()), 6))) > 10


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
