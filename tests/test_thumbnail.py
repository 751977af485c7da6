"""The thumbnail baseline: features against OpenCV, learning, determinism, and the known value on real images."""

import csv

import cv2
import numpy as np
import pytest
from conftest import REAL

from cxa_jax import thumbnail
from cxa_jax.errors import UserError
from cxa_jax.metrics import compute_auroc


@pytest.mark.parametrize("shape", [(32, 32), (50, 70), (9, 8)])
def test_features_are_area_means_of_the_normalised_image(shape: tuple[int, int]):
    images = np.random.default_rng(1).integers(20, 200, (5, *shape, 1), dtype=np.uint8)
    features = thumbnail.compute_thumbnail_features(images)
    for row, image in zip(features, images[..., 0].astype(np.float64), strict=True):
        normalised = (image - image.min()) / (image.max() - image.min())
        expected = cv2.resize(normalised, (8, 8), interpolation=cv2.INTER_AREA)
        assert row.reshape(8, 8) == pytest.approx(expected, abs=1e-6)


def test_features_ignore_gain_and_offset_and_survive_constant_images():
    images = np.random.default_rng(2).integers(0, 100, (3, 16, 16, 1), dtype=np.uint8)
    changed = thumbnail.compute_thumbnail_features(2 * images + 30)
    assert changed == pytest.approx(thumbnail.compute_thumbnail_features(images), abs=1e-12)
    assert not thumbnail.compute_thumbnail_features(np.full((1, 16, 16, 1), 9, np.uint8)).any()


def _draw_images(seed: int, num_images: int = 240, size_px: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw noise with a bright patch, wider where the label is 1; three images a patient."""
    rng = np.random.default_rng(seed)
    patients = np.arange(num_images) // 3
    labels = (rng.random(num_images) < 0.4).astype(int)
    images = rng.integers(0, 120, (num_images, size_px, size_px, 1))
    for image, label in zip(images, labels, strict=True):
        left = rng.integers(2, 6)
        image[8:18, left : left + 7 + 4 * label + rng.integers(0, 4)] += 60
    return images.astype(np.uint8), labels, patients


def test_baseline_learns_deterministically_and_does_not_need_test_images_together():
    train, labels, patients = _draw_images(3)
    test, test_labels, _ = _draw_images(4)
    scores = thumbnail.thumbnail_baseline(train, labels, test, patients)
    assert scores.shape == (240,) and 0 <= scores.min() and scores.max() <= 1
    assert compute_auroc(test_labels, scores) > 0.85
    assert np.array_equal(scores, thumbnail.thumbnail_baseline(train, labels, test, patients))
    assert thumbnail.thumbnail_baseline(train, labels, test[:7], patients) == pytest.approx(scores[:7], abs=1e-12)


def test_folds_hold_whole_patients_with_both_classes():
    _, labels, patients = _draw_images(5)
    folds = thumbnail._make_folds(labels, patients)
    assert len(folds) == 5
    for train, held_out in folds:
        assert not set(patients[train]) & set(patients[held_out])
        assert 0 < labels[held_out].sum() < len(held_out)


def test_regularisation_is_chosen_on_the_training_images():
    rng = np.random.default_rng(6)
    labels = np.arange(60) % 2
    noisy = rng.normal(size=(60, 64))
    noisy[:, 0] += 0.7 * labels
    clear = rng.normal(size=(1500, 64))
    clear_labels = (clear @ rng.normal(size=64) + rng.normal(size=1500) > 0).astype(int)
    chosen = [
        thumbnail.fit_thumbnail_baseline(*data).best_params_["logisticregression__C"]
        for data in ((noisy, labels), (clear, clear_labels))
    ]
    assert chosen[0] < chosen[1]


def test_bad_input_is_named():
    train, labels, patients = _draw_images(7, 12)
    with pytest.raises(UserError, match="float64"):
        thumbnail.thumbnail_baseline(train / 255, labels, train)
    with pytest.raises(UserError, match=r"\(12, 4, 4, 1\)"):
        thumbnail.thumbnail_baseline(train[:, :4, :4], labels, train)
    with pytest.raises(UserError, match="12 images, 11 labels"):
        thumbnail.thumbnail_baseline(train, labels[1:], train)
    with pytest.raises(UserError, match="two patients of each class"):
        thumbnail.thumbnail_baseline(train, np.zeros(12, int), train, patients)


def test_baseline_on_real_images_reaches_the_known_auroc():
    meta, folder = REAL / "chestxray14_meta", REAL / "chestxray14_128" / "images"
    if not (meta.exists() and folder.exists()):
        pytest.skip(f"the real images are not here: {folder}")
    official_test = set((meta / "test_list.txt").read_text().split())
    with (meta / "Data_Entry_2017_v2020.csv").open(newline="") as file:
        findings = {row["Image Index"]: (row["Finding Labels"], row["Patient ID"]) for row in csv.DictReader(file)}
    names = sorted(path.name for path in folder.iterdir())
    images = np.stack([cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE) for name in names])[..., None]
    labels = np.array(["Cardiomegaly" in findings[name][0].split("|") for name in names]).astype(int)
    patients = np.array([findings[name][1] for name in names])
    test = np.array([name in official_test for name in names])
    assert (labels[test].sum(), labels[~test].sum(), len(names)) == (115, 242, 6385)
    scores = thumbnail.thumbnail_baseline(images[~test], labels[~test], images[test], patients[~test])
    assert compute_auroc(labels[test], scores) == pytest.approx(0.735, abs=0.03)
