"""Pictures kept for a report: the right rows, the same in every run, and everything back as it was."""

import pathlib

import numpy as np
import pytest
import tiny
from finished_runs import draw_predictions, make_test_split

from cxa_jax import saved_maps
from cxa_jax.errors import UserError


def test_boxed_shared_and_worst_images_are_kept():
    split = make_test_split(200)
    boxed = np.flatnonzero(split.index["label"] == 1)[:5]
    kept = []
    for seed in (0, 1):
        predictions = draw_predictions(split, seed, 1.0, "amm")
        rows = saved_maps.choose_rows(predictions, boxed)
        assert set(boxed) <= set(rows) and len(np.unique(rows)) == len(rows)
        positives = np.flatnonzero(predictions.label == 1)
        assert positives[np.argmin(predictions.logit[positives])] in rows
        negatives = np.flatnonzero(predictions.label == 0)
        assert negatives[np.argmax(predictions.logit[negatives])] in rows
        kept.append(set(rows))
    for label in (0, 1):
        shared = saved_maps.draw_shared_rows(split.index["id"], split.index["label"], label)
        assert len(shared) == saved_maps.NUM_SHARED and set(shared) <= kept[0] & kept[1]
        turned = saved_maps.draw_shared_rows(split.index["id"][::-1], split.index["label"][::-1], label)
        assert (len(split.index["id"]) - 1 - turned).tolist() == shared.tolist()


def test_what_is_saved_comes_back(tmp_path: pathlib.Path):
    split = make_test_split()
    predictions = draw_predictions(split, 0, 1.0, "gap")
    rows = np.array([3, 8, 20])
    saved_maps.save_maps(tmp_path / "maps.npz", predictions, split, rows, 32, 14)
    back = saved_maps.load_maps(tmp_path / "maps.npz")
    assert back.ids.tolist() == split.index["id"][rows].tolist() and back.find(split.index["id"][8]) == 1
    assert set(back.maps) == {"evidence", "cam", "grad_cam"}  # flat attention and weights say nothing
    np.testing.assert_array_equal(back.maps["cam"], predictions.cam[rows])
    np.testing.assert_array_equal(back.boxes, np.repeat([[28, 20, 24, 24]], 3, 0))
    assert (back.image_size, back.stride, back.offset) == (tiny.SIZE, 32, 14)
    assert back.images.shape == (3, 64, 64) and back.images.min() == 0 and back.images.max() == 255
    assert [path.name for path in tmp_path.iterdir()] == ["maps.npz"]


def test_large_images_are_reduced(tmp_path: pathlib.Path):
    split = tiny.make_split("test", 6, 0, 1024)
    predictions = draw_predictions(split, 0, 1.0, "amm")
    saved_maps.save_maps(tmp_path / "maps.npz", predictions, split, np.arange(6), 32, 14)
    back = saved_maps.load_maps(tmp_path / "maps.npz")
    assert back.images.shape == (6, 256, 256) and back.image_size == 1024


def test_a_broken_file_is_named(tmp_path: pathlib.Path):
    (tmp_path / "maps.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="maps.npz cannot be read"):
        saved_maps.load_maps(tmp_path / "maps.npz")
