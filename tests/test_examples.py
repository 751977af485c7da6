"""The drawn files are what the commands take: classes, patients, boxes, and odd ones."""

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
