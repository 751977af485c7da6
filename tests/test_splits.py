import numpy as np
import pytest

from cxa_jax.data.splits import count_shared_patients, draw_dev_split
from cxa_jax.errors import UserError


def _cohort(seed: int, num_patients: int = 400) -> tuple[list[str], np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), rng.integers(1, 8, num_patients))
    sick = rng.random(num_patients) < 0.15
    labels = (sick[patients] & (rng.random(len(patients)) < 0.6)).astype(int)
    return [f"{p:05d}_{i:03d}.png" for i, p in enumerate(patients)], labels, [str(p) for p in patients]


@pytest.mark.parametrize("by", ["image", "patient"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dev_holds_its_share_of_each_class(by, seed):
    ids, labels, patients = _cohort(seed)
    dev = draw_dev_split(ids, labels, patients, by=by, fraction=0.1, seed=seed)
    for label in (0, 1):
        assert dev[labels == label].sum() == int(0.1 * (labels == label).sum() + 0.5)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_patient_split_is_disjoint_and_image_split_is_not(fraction):
    ids, labels, patients = _cohort(7)
    owners = np.array(patients)
    shared = {}
    for by in ("patient", "image"):
        dev = draw_dev_split(ids, labels, patients, by=by, fraction=fraction, seed=0)
        shared[by] = len(np.intersect1d(owners[dev], owners[~dev]))
    assert shared["patient"] == 0
    assert shared["image"] > 0


@pytest.mark.parametrize("by", ["image", "patient"])
def test_split_depends_on_the_seed_and_not_on_the_order(by):
    ids, labels, patients = _cohort(8)
    dev = draw_dev_split(ids, labels, patients, by=by, fraction=0.1, seed=0)
    order = np.random.default_rng(9).permutation(len(ids))
    moved = draw_dev_split(
        [ids[i] for i in order], labels[order], [patients[i] for i in order], by=by, fraction=0.1, seed=0
    )
    np.testing.assert_array_equal(moved, dev[order])
    assert np.any(draw_dev_split(ids, labels, patients, by=by, fraction=0.1, seed=1) != dev)


def test_the_draw_never_changes():
    # A prepared set must be drawn alike by every version: these names were computed once, with sha256 by hand.
    ids = [f"{i:03d}" for i in range(40)]
    dev = draw_dev_split(ids, [i % 2 for i in range(40)], ids, by="image", fraction=0.1, seed=0)
    assert [name for name, chosen in zip(ids, dev, strict=True) if chosen] == ["016", "023", "024", "031"]


def test_bad_settings_are_named():
    ids, labels, patients = _cohort(10)
    with pytest.raises(UserError, match="config.data.dev_split='images'"):
        draw_dev_split(ids, labels, patients, by="images", fraction=0.1, seed=0)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="config.data.dev_fraction"):
            draw_dev_split(ids, labels, patients, by="image", fraction=fraction, seed=0)


def test_a_side_without_one_class_is_an_error():
    with pytest.raises(UserError, match="dev split would hold no image of class 1"):
        draw_dev_split(list("abcdefghijkl"), [1] + [0] * 11, list("abcdefghijkl"), by="image", fraction=0.2, seed=0)
    with pytest.raises(UserError, match="train split would hold no image of class 1"):
        draw_dev_split(list("abcdefghijkl"), [1] + [0] * 11, list("abcdefghijkl"), by="image", fraction=0.6, seed=0)


def test_count_shared_patients():
    shared = count_shared_patients({"train": ["1", "1", "2", "3"], "dev": ["3", "2", "4"], "test": ["5", "4"]})
    assert shared == {("train", "dev"): 2, ("train", "test"): 0, ("dev", "test"): 1}
