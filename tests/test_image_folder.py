"""One's own images as a prepared data set: pixels, boxes, splits by patient, and copies across splits."""

import csv
import logging

import numpy as np
import pytest
from PIL import Image

from configs import common
from cxa_jax.data import image_folder
from cxa_jax.data.datasets import load_dataset
from cxa_jax.data.folder_table import Row
from cxa_jax.data.image_folder import assign_splits
from cxa_jax.data.images import load_grey
from cxa_jax.data.preparation import prepare
from cxa_jax.errors import UserError

SIZE = 48


def smooth_image(seed):
    """Return a picture of low frequencies, as X-rays are, uint8 [80, 96]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7), np.uint8)
    return Image.fromarray(small).resize((96, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def config(tmp_path):
    """40 images of 20 patients in class folders; image 3 of the first patient is a copy for the leak tests."""
    for i in range(40):
        folder = tmp_path / "xrays" / ("cardiomegaly" if i // 2 % 3 == 0 else "no_finding")
        folder.mkdir(parents=True, exist_ok=True)
        smooth_image(i).save(folder / f"p{i // 2:02d}_{i % 2}.png")
    data = common.get_config("x", "densenet121").data
    data.name, data.manual_dir, data.data_dir = "image_folder", str(tmp_path / "xrays"), str(tmp_path / "data")
    data.image_size, data.num_workers, data.dev_fraction = SIZE, 1, 0.2
    data.folder.patient_regex, data.folder.test_fraction = r"(p\d+)_", 0.3
    return data


def test_prepared_like_the_others(config):
    prepare(config)
    dataset = load_dataset(config)
    splits = dataset.splits
    assert sum(len(split.source) for split in splits.values()) == 40 and not dataset.is_phantom
    patients = {name: set(split.index["patient"]) for name, split in splits.items()}
    assert not (patients["train"] & patients["test"] or patients["dev"] & patients["test"])
    assert not patients["train"] & patients["dev"] and all(patients.values())
    record = splits["train"].source[0]
    path = f"{config.manual_dir}/{record['id']}"
    np.testing.assert_array_equal(record["image"][..., 0], load_grey(path, SIZE).pixels)
    assert record["label"] == int("cardiomegaly" in record["id"]) and record["boxes"].shape == (0, 4)
    prepare(config)  # the same again: kept


def test_a_table_with_boxes_and_splits(config, tmp_path):
    ids = sorted(path.relative_to(config.manual_dir).as_posix() for path in (tmp_path / "xrays").rglob("*.png"))
    lines = ["path,label,patient,split,boxes"]
    for i, name in enumerate(ids):
        box = "24 20 48 40" if "cardiomegaly" in name else ""
        lines.append(f"{name},{int('cardio' in name)},q{i},{('train', 'dev', 'test')[i % 3]},{box}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    config.folder.table = str(tmp_path / "t.csv")
    prepare(config)
    split = load_dataset(config).splits["test"]
    assert list(split.index["id"]) == sorted(ids[2::3])
    row = int(np.argmax(split.index["label"]))
    np.testing.assert_allclose(split.source[row]["boxes"], [[12, 12, 24, 24]])  # 96 x 80 px to 48 x 48


def test_copies_across_splits_are_reported(config, tmp_path, caplog):
    for split, numbers in {"train": range(24), "test": range(24, 40)}.items():
        for i in numbers:
            folder = tmp_path / "split" / split / ("cardiomegaly" if i % 3 == 0 else "no_finding")
            folder.mkdir(parents=True, exist_ok=True)
            smooth_image(i).save(folder / f"p{i // 2:02d}_{i}.png")
    test = tmp_path / "split" / "test"
    smooth_image(4).save(test / "no_finding" / "p90_0.png")  # identical to a training image
    smooth_image(6).resize((70, 60)).point(lambda v: 0.8 * v + 20).save(test / "no_finding" / "p91_0.jpg", quality=85)
    config.manual_dir, config.folder.patient_regex = str(tmp_path / "split"), r"(p\d+)_"
    logging.getLogger("cxa_jax").propagate = True
    prepare(config)
    assert "LEAKAGE" in caplog.text
    folder = image_folder.create_builder(config).data_path
    with open(folder / image_folder.LEAKAGE_FILE, newline="") as file:
        found = [(row["id_a"], row["id_b"], row["identical"]) for row in csv.DictReader(file)]
    pairs = {(a.split("/")[-1], b.split("/")[-1], identical) for a, b, identical in found}
    assert pairs == {("p02_4.png", "p90_0.png", "True"), ("p03_6.png", "p91_0.jpg", "False")}


def test_changed_files_are_refused(config, tmp_path):
    prepare(config)
    smooth_image(77).resize((20, 20)).save(tmp_path / "xrays" / "no_finding" / "p01_0.png")
    with pytest.raises(UserError, match="other files or labels"):
        prepare(config)


def test_not_prepared(config):
    with pytest.raises(UserError, match="--mode=prepare"):
        load_dataset(config)
    config.manual_dir = ""
    with pytest.raises(UserError, match="manual_dir is empty"):
        prepare(config)


def test_bad_boxes_and_bad_images(config, tmp_path):
    names = [path.relative_to(config.manual_dir).as_posix() for path in (tmp_path / "xrays").rglob("*.png")]
    lines = ["path,label,boxes", *(f"{name},{int('cardio' in name)},50 50 60 20" for name in names)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    config.folder.table = str(tmp_path / "t.csv")
    with pytest.raises(UserError, match="leaves its image of 96 x 80"):
        prepare(config)
    config.folder.table = ""
    (tmp_path / "xrays" / "no_finding" / "p01_0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 of 40 images cannot be read"):
        prepare(config)


def rows(**splits):
    return [
        Row(f"{split}{i}", None, f"{split}{i}", i % 2, "" if split == "none" else split)
        for split, number in splits.items()
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 4, "none": 4}, "others do not"),
        ({"train": 9, "dev": 9}, "train and test are needed"),
        ({"train": 9, "test": 1}, "the test split has 1 images of one class"),
        ({"none": 2}, "cannot draw the test split"),
    ],
)
def test_splits_that_cannot_be(config, splits, message):
    with pytest.raises(UserError, match=message):
        assign_splits(rows(**splits), config)


def test_dev_is_drawn_where_it_is_not_named(config):
    parts = assign_splits(rows(train=40, test=10), config)
    assert {name: len(part) for name, part in parts.items()} == {"train": 32, "dev": 8, "test": 10}
