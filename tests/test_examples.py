"""Drawn files are what the commands take, classes, patients, boxes, and odd ones; the toy shows what the docs say."""

import pathlib
import runpy

import numpy as np
import pytest
from PIL import Image

from configs import common
from cxa_jax.data.folder_table import read_rows
from cxa_jax.data.images import read_grey
from cxa_jax.errors import UserError

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def test_drawn_phantoms_are_a_labelled_folder_and_odd_files(tmp_path):
    runpy.run_path(str(EXAMPLES / "draw_phantoms.py"))["main"](tmp_path, num_patients=4)
    options = common.get_config("x", "densenet121").data.folder
    options.patient_regex = r"(p\d+)_"
    by_folder = read_rows(tmp_path / "labelled", options)
    options.table = str(tmp_path / "labels.csv")
    by_table = read_rows(tmp_path / "labelled", options)
    assert {row.patient for row in by_folder} == {f"p{patient:04d}" for patient in range(4)}
    assert [row._replace(boxes=()) for row in by_table] == by_folder
    assert all(bool(row.boxes) == bool(row.label) for row in by_table)

    dicom, _, notes = read_grey(tmp_path / "odd" / "monochrome1_12bit.dcm")
    upright = np.asarray(Image.open(tmp_path / "odd" / "upside_down.png"))[::-1]
    assert np.abs(dicom.astype(int) - upright).max() <= 1 and notes == ()
    np.testing.assert_array_equal(255 - np.asarray(Image.open(tmp_path / "odd" / "inverted.png")), upright)
    with pytest.raises(UserError, match="truncated"):
        read_grey(tmp_path / "odd" / "cut.png")


def test_attention_finds_the_object_if_evidence_is_local_and_not_otherwise():
    toy = runpy.run_path(str(EXAMPLES / "local_evidence.py"))
    seed = int(np.random.default_rng().integers(1000))
    features, labels, objects = toy["draw_grids"](np.random.default_rng(seed), 4000, radius=1)
    assert (objects.sum((1, 2)) == toy["OBJECT"] ** 2).all()
    beside = np.zeros_like(objects)  # by shifting the object, cell by cell
    for rows in (-1, 0, 1):
        for columns in (-1, 0, 1):
            padded = np.pad(objects, ((0, 0), (1, 1), (1, 1)))
            beside |= padded[:, 1 + rows : 9 + rows, 1 + columns : 9 + columns]
    positive = labels[:, None, None] == 1
    for channel, where, height in ((0, objects, 2), (1, beside & positive, 1), (2, objects, 0)):
        for cells, expected in ((where, height), (~where, 0)):
            assert features[..., channel][cells].mean() == pytest.approx(expected, abs=0.03)
    accuracy, ratio = toy["train"](radius=0, rate=0.1, seed=seed, num_steps=200)
    assert accuracy > 0.85 and ratio > 1.8
    accuracy, ratio = toy["train"](radius=toy["SIDE"], rate=0.1, seed=seed, num_steps=200)
    assert accuracy > 0.97 and ratio == pytest.approx(1, abs=0.12)
