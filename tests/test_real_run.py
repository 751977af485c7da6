"""A slice of the run on real images: prepared from NIH's files, trained, tested, and with whatever boxes it has."""

import csv
import json
import logging

import numpy as np
import pytest
import tiny
from conftest import REAL

from configs import dense121
from cxa_jax.data import chestxray14
from cxa_jax.errors import UserError
from cxa_jax.train import train_and_evaluate

IMAGES = REAL / "chestxray14_128/images"
META = REAL / "chestxray14_meta"
pytestmark = pytest.mark.skipif(not IMAGES.is_dir(), reason="the real images are not here")


def choose_images():
    """Return 90 names: of each official list 30 negatives and 15 positives, the test positives with a box."""
    with (META / "Data_Entry_2017_v2020.csv").open() as file:
        positive = {row["Image Index"]: "Cardiomegaly" in row["Finding Labels"] for row in csv.DictReader(file)}
    with (META / "BBox_List_2017.csv").open() as file:
        boxed = {row[0] for row in csv.reader(file) if row[1] == "Cardiomegaly"}
    test = set((META / "test_list.txt").read_text().split())
    names = [path.name for path in sorted(IMAGES.iterdir())]
    rng = np.random.default_rng(0)
    groups = (
        [n for n in names if n in test and positive[n] and n in boxed],
        [n for n in names if n in test and not positive[n]],
        [n for n in names if n not in test and positive[n]],
        [n for n in names if n not in test and not positive[n]],
    )
    return [n for group, size in zip(groups, (15, 30, 15, 30), strict=True) for n in rng.choice(group, size, False)]


def test_prepare_train_and_test_on_real_images(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for name in choose_images():
        (tmp_path / "images" / name).symlink_to(IMAGES / name)
    config = dense121.get_config("nih_128")
    config.model.backbone = "tiny"
    config.data.data_dir = str(tmp_path / "data")
    config.data.manual_dir = f"{META},{tmp_path / 'images'}"
    config.data.dev_fraction = 0.3
    config.data.allow_missing = True
    config.data.num_workers = 1
    config.train.num_epochs = 1
    config.train.batch_size = 8
    config.eval.num_bootstrap = 50
    assert "tiny" in tiny.BACKBONES
    with pytest.raises(UserError, match="--config.data.dev_split=patient"):
        train_and_evaluate(config, str(tmp_path / "run"))  # not prepared: the cure has the fields that matter
    chestxray14.prepare(config.data)
    with caplog.at_level(logging.INFO, logger="cxa_jax"):
        report = train_and_evaluate(config, str(tmp_path / "run"))
    assert "a part of it: 63,047 images are missing" in caplog.text
    assert report["phantom"] is False and report["data"] == "chestxray14"
    assert report["test"]["num_images"] == 45 and report["test"]["num_positives"] == 15
    assert report["localization"]["num_images"] == 15
    assert report["localization"]["all_boxed"]["rules"]["half_max"]["median_box"]["pointing"]["estimate"] > 0.8
    assert "train/dev 0" in caplog.text
    with (tmp_path / "run/predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] for row in rows} <= set(choose_images()) and len(rows) == 45
    assert json.loads((tmp_path / "run/environment.json").read_text())[0]["data"] == "chestxray14"
