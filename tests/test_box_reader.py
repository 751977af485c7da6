"""Boxes read off maps: ridge regression against scikit-learn, what it finds and does not find, what it refuses."""

import dataclasses

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxa_jax.box_reader import (
    ALL_MAPS,
    ALPHAS,
    WITH_MAPS,
    fit_reader,
    fit_readers,
    list_readers,
    load_readers,
    read_boxes,
    save_readers,
    score_readers,
)
from cxa_jax.boxes import compute_coverage, compute_iou, compute_median_boxes
from cxa_jax.errors import UserError
from cxa_jax.localization import score_boxes
from cxa_jax.localization_table import (
    GAIN,
    GAINS,
    RANDOM_WEIGHTS,
    READER,
    LocalizationTable,
    summarize_tables,
)
from cxa_jax.scored_maps import THUMBNAIL
from cxa_jax.thumbnail import make_thumbnails

SIZE, GRID = (64, 96), (8, 12)


def draw(seed, num_images=160):
    """Return maps, boxes, patients of two images each; `evidence` is the box's share of each cell, `noise` is noise."""
    rng = np.random.default_rng(seed)
    corner, extent = rng.uniform([14, 10], [30, 22], (num_images, 2)), rng.uniform([25, 18], [50, 34], (num_images, 2))
    boxes = np.concatenate([corner, extent], axis=1)
    cells = [compute_coverage(box, *SIZE).reshape(GRID[0], 8, GRID[1], 8).mean(axis=(1, 3)) for box in boxes]
    maps = {
        "evidence": np.array(cells) + rng.normal(0, 0.01, (num_images, *GRID)),
        "noise": rng.random((num_images, *GRID)),
    }
    return maps, boxes, np.array([f"p{row // 2}" for row in range(num_images)])


def test_boxes_are_read_off_maps_that_hold_them_and_off_no_others():
    maps, boxes, patients = draw(0)
    fresh, true_boxes, _ = draw(1)
    found = read_boxes(fit_reader(("evidence",), maps, boxes, patients, SIZE), fresh, SIZE)
    assert compute_iou(found, true_boxes).mean() > 0.9
    blind = fit_reader(("noise",), maps, boxes, patients, SIZE)
    found = read_boxes(blind, fresh, SIZE)
    mean_edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).mean(axis=0)
    constant = np.concatenate([mean_edges[:2], mean_edges[2:] - mean_edges[:2]])
    assert blind.alpha >= 1000 and compute_iou(found, constant).mean() > 0.9
    shuffled = read_boxes(
        fit_reader(("evidence",), {"evidence": np.roll(maps["evidence"], 7, 0)}, boxes, patients, SIZE), fresh, SIZE
    )
    assert compute_iou(shuffled, true_boxes).mean() < compute_iou(constant, true_boxes).mean() + 0.02


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_images", [30, 150])  # fewer images than cells, and more
def test_it_is_scikit_learns_ridge(seed, num_images):
    maps, boxes, patients = draw(seed, num_images)
    patients = np.random.default_rng(seed).integers(0, 12, num_images).astype(str)
    names = ("evidence", "noise")
    reader = fit_reader(names, maps, boxes, patients, SIZE)
    features = np.concatenate([maps[name].reshape(num_images, -1) for name in names], axis=1)
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / [96, 64, 96, 64]
    model = lambda alpha: make_pipeline(StandardScaler(), Ridge(alpha))  # noqa: E731
    errors = [
        np.mean((cross_val_predict(model(alpha), features, edges, groups=patients, cv=GroupKFold(5)) - edges) ** 2)
        for alpha in ALPHAS
    ]
    assert reader.alpha == ALPHAS[int(np.argmin(errors))] and reader.num_images == num_images
    # and in closed form
    centred = (features - features.mean(axis=0)) / features.std(axis=0)
    gram = centred.T @ centred + reader.alpha * np.eye(features.shape[1])
    expected = np.linalg.solve(gram, centred.T @ (edges - edges.mean(axis=0)))
    np.testing.assert_allclose(reader.coefficients, expected, atol=1e-10)
    fresh, _, _ = draw(seed + 10, num_images)
    rows = np.concatenate([fresh[name].reshape(num_images, -1) for name in names], axis=1)
    predicted = model(reader.alpha).fit(features, edges).predict(rows) * [96, 64, 96, 64]
    found = read_boxes(reader, fresh, SIZE)
    inside = (predicted.min(axis=1) >= 0) & (predicted <= [96, 64, 96, 64]).all(axis=1)
    assert inside.any()
    np.testing.assert_allclose(found[inside, :2], predicted[inside, :2], atol=1e-8)
    np.testing.assert_allclose((found[:, :2] + found[:, 2:])[inside], predicted[inside, 2:], atol=1e-8)


def test_images_of_a_patient_stay_together():
    """A map that knows its patient and nothing else: were images of one on both sides, it would be believed."""
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(30), 4)
    code, place = rng.normal(size=(30, *GRID)), rng.uniform(0, 20, 30)
    boxes = np.stack([[x, 10, 40, 30] for x in place[patients]])
    maps = {"code": code[patients] + rng.normal(0, 0.01, (120, *GRID))}
    assert fit_reader(("code",), maps, boxes, patients, SIZE).alpha > 100
    assert fit_reader(("code",), maps, boxes, np.arange(120), SIZE).alpha < 100


def test_w_is_read_on_its_logit():
    maps, boxes, patients = draw(4)
    scores = 8 * (maps["evidence"] - 0.5)
    named = {"attention": expit(scores), f"{RANDOM_WEIGHTS}_attention": expit(scores), "z": scores}
    expected = fit_reader(("z",), named, boxes, patients, SIZE)
    for name in ("attention", f"{RANDOM_WEIGHTS}_attention"):
        np.testing.assert_allclose(
            fit_reader((name,), named, boxes, patients, SIZE).coefficients, expected.coefficients
        )
    saturated = {"attention": np.round(named["attention"])}  # 0 and 1
    assert fit_reader(("attention",), saturated, boxes, patients, SIZE).center.max() <= logit(1 - 1e-6)


def test_another_size_of_the_same_grid_is_read_in_fractions_of_the_sides():
    maps, boxes, patients = draw(5)
    reader = fit_reader(("evidence",), maps, boxes, patients, SIZE)
    np.testing.assert_allclose(read_boxes(reader, maps, (128, 192)), 2 * read_boxes(reader, maps, SIZE))


def test_wild_cells_still_give_a_box_inside_the_image():
    maps, boxes, patients = draw(6)
    reader = fit_reader(("evidence",), maps, boxes, patients, SIZE)
    wild = {"evidence": np.random.default_rng(6).normal(0, 100, (50, *GRID))}
    found = read_boxes(reader, wild, SIZE)
    assert (found[:, :2] >= 0).all() and (found[:, :2] + found[:, 2:] <= [96, 64]).all() and (found[:, 2:] >= 1).all()


def test_every_map_alone_and_all_together_with_their_controls():
    names = ["attention", "evidence", f"{RANDOM_WEIGHTS}_attention", f"{RANDOM_WEIGHTS}_evidence"]
    random = tuple(names[2:])
    assert list_readers(names) == {
        THUMBNAIL: (THUMBNAIL,),
        **{name: (name,) for name in names},
        ALL_MAPS: ("attention", "evidence"),
        WITH_MAPS: (THUMBNAIL, "attention", "evidence"),
        f"{RANDOM_WEIGHTS}_{ALL_MAPS}": random,
        f"{RANDOM_WEIGHTS}_{WITH_MAPS}": (THUMBNAIL, *random),
    }
    assert set(list_readers(["evidence"])) == {THUMBNAIL, "evidence", ALL_MAPS, WITH_MAPS}


def test_scores_and_gains_above_the_thumbnail():
    maps, boxes, patients = draw(7)
    test, true_boxes, test_patients = draw(8)
    named = lambda maps: {"evidence": maps["evidence"], THUMBNAIL: maps["noise"]}  # noqa: E731
    readers = fit_readers(named(maps), boxes, patients, SIZE)
    scores = score_readers(readers, named(test), true_boxes, test_patients, SIZE)
    assert set(scores) == {(name, READER) for name in ("evidence", THUMBNAIL, ALL_MAPS, WITH_MAPS, "median_box")}
    expected = score_boxes(read_boxes(readers["evidence"], named(test), SIZE), true_boxes, test_patients)
    np.testing.assert_array_equal(scores["evidence", READER].iou, expected.iou)
    median = compute_iou(compute_median_boxes(true_boxes, test_patients), true_boxes)
    np.testing.assert_array_equal(scores["median_box", READER].iou, median)
    table = LocalizationTable(np.arange(160).astype(str), np.ones(160, bool), scores)
    rows = summarize_tables([table], num_resamples=100, seed=0)["all_boxed"]["rules"][READER]
    for metric, control in ((GAIN, "median_box"), (GAINS[THUMBNAIL][0], THUMBNAIL)):
        assert metric not in rows[THUMBNAIL] and metric not in rows["median_box"]
        difference = scores["evidence", READER].iou - scores[control, READER].iou
        found = rows["evidence"][metric]
        assert found["estimate"] == pytest.approx(difference.mean()) and found["low"] > 0.1
        each = np.array([difference[test_patients == patient].mean() for patient in np.unique(test_patients)])
        half = 1.96 * each.std(ddof=1) / np.sqrt(len(each))  # patients of two images each
        assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.35)


def test_a_map_of_one_value_is_left_out():
    maps, boxes, patients = draw(9)
    readers = fit_readers(maps | {THUMBNAIL: maps["noise"]}, boxes, patients, SIZE)
    del maps["noise"]
    found = score_readers(readers, maps | {THUMBNAIL: maps["evidence"]}, boxes, patients, SIZE)
    assert {name for name, _ in found} == {"evidence", THUMBNAIL, "median_box"}


def test_thumbnails_are_the_images_area_means_on_the_grid():
    images = np.random.default_rng(10).integers(0, 256, (3, *SIZE, 1)).astype(np.uint8)
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    expected = images[..., 0].reshape(3, 8, 8, 12, 8).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(make_thumbnails(iter(images), GRID), expected, atol=1e-12)


def test_readers_come_back_from_disk_as_they_were(tmp_path):
    maps, boxes, patients = draw(11)
    readers = fit_readers(maps | {THUMBNAIL: maps["noise"]}, boxes, patients, SIZE)
    save_readers(tmp_path / "readers.npz", readers)
    back = load_readers(tmp_path / "readers.npz")
    assert list(back) == list(readers)
    for name, reader in readers.items():
        for field, value in vars(reader).items():
            np.testing.assert_array_equal(getattr(back[name], field), value)
            assert type(getattr(back[name], field)) is type(value)
    for nothing in (None, {}):
        save_readers(tmp_path / "readers.npz", nothing)  # those of an earlier test would be taken for this one's
        assert not list(tmp_path.iterdir())
    (tmp_path / "readers.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"readers.npz cannot be read .*evaluate that run again"):
        load_readers(tmp_path / "readers.npz")
    broken = {"evidence": dataclasses.replace(readers["evidence"], intercept=np.full(4, np.nan))}
    save_readers(tmp_path / "broken.npz", broken)
    with pytest.raises(UserError, match="intercept of evidence is not"):
        load_readers(tmp_path / "broken.npz")


def test_what_does_not_fit_is_refused():
    maps, boxes, patients = draw(12, 20)
    fit = lambda **changes: fit_reader(  # noqa: E731
        **{"names": ("evidence",), "maps": maps, "boxes": boxes, "patients": patients, "image_size": SIZE} | changes
    )
    reader = fit()
    with pytest.raises(UserError, match="maps that are not here: evidence"):
        read_boxes(reader, {"noise": maps["noise"]}, SIZE)
    with pytest.raises(UserError, match="maps have 8x6 cells, and the reader of boxes was fitted on 8x12"):
        read_boxes(reader, {"evidence": maps["evidence"][..., ::2]}, SIZE)
    with pytest.raises(UserError, match="images of two patients to be fitted on; there are 1"):
        fit(patients=np.zeros(20, int))
    with pytest.raises(UserError, match="20 maps, 20 boxes, 19 patients"):
        fit(patients=patients[:19])
    with pytest.raises(UserError, match="several shapes"):
        fit(names=("evidence", "noise"), maps=maps | {"noise": maps["noise"][:, :4]})
    with pytest.raises(UserError, match="map 'evidence' is .* without nan"):
        fit(maps={"evidence": np.full((20, *GRID), np.nan)})
