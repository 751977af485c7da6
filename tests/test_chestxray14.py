import json
import multiprocessing
import pathlib
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from nih_tree import BOXES, IMAGES, TASK_IMAGES, make_download, write_images, write_labels, write_metadata
from PIL import Image

from configs import dense121
from cxa_jax.data import chestxray14, images, nih_download, preparation, records
from cxa_jax.data.datasets import load_dataset
from cxa_jax.data.nih_download import Download
from cxa_jax.errors import UserError

REAL = pathlib.Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    config = dense121.get_config().data
    config.data_dir = str(tmp_path / "data")
    config.manual_dir = str(tmp_path / "nih")
    config.image_size = 32
    config.dev_fraction = 0.25
    config.num_workers = 1
    return config


def _read(config: ConfigDict) -> dict[str, list[dict]]:
    builder = chestxray14.find_prepared(config)
    sources = {split: builder.as_data_source(split) for split in ("train", "dev", "test")}
    return {split: [records.decode(source[i]) for i in range(len(source))] for split, source in sources.items()}


def _named(config: ConfigDict) -> ConfigDict:
    named = config.copy_and_resolve_references()
    named.name = "chestxray14"
    return named


def _find(config: ConfigDict, name: str) -> pathlib.Path:
    return next(pathlib.Path(config.manual_dir).rglob(name))


def test_stored_records(config):
    pixels = make_download(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    stored = _read(config)
    assert {split: len(rows) for split, rows in stored.items()} == {"train": 9, "dev": 3, "test": 4}
    every = [record for rows in stored.values() for record in rows]
    assert sorted(record["id"] for record in every) == TASK_IMAGES
    for split, rows in stored.items():
        assert [record["id"] for record in rows] == sorted(record["id"] for record in rows)
        for record in rows:
            findings, patient, part = IMAGES[record["id"]]
            assert (split == "test") == (part == "test")
            assert record["findings"] == findings
            assert record["patient"] == str(patient)
            assert record["label"] == ("Cardiomegaly" in findings)
            assert (record["age"], record["sex"], record["view"]) == (58, "F", "PA")
            np.testing.assert_array_equal(record["image"][..., 0], images.resize_square(pixels[record["id"]], 32))
            # From the 1024 px frame to 32 px, whatever the size of the file.
            expected = np.array([BOXES[record["id"]]]) / 32 if record["id"] in BOXES else np.zeros((0, 4))
            np.testing.assert_array_equal(record["boxes"], expected)


def test_other_findings_are_a_set_of_their_own(config):
    write_images(pathlib.Path(config.manual_dir), names=list(IMAGES))
    write_metadata(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    config.other_findings = True
    assert chestxray14.find_prepared(config) is None
    with pytest.raises(UserError, match="--config.data.other_findings=True"):
        load_dataset(_named(config))
    chestxray14.prepare(config)
    stored = _read(config)
    labels = {record["id"]: record["label"] for rows in stored.values() for record in rows}
    assert labels == {name: "Cardiomegaly" in findings for name, (findings, _, _) in IMAGES.items()}
    provenance = chestxray14.load_provenance(chestxray14.create_builder(config))
    others = [split.get("other_findings", 0) for split in provenance["splits"].values()]
    assert sum(others) == len(IMAGES) - len(TASK_IMAGES)
    assert "not the paper's task" in load_dataset(_named(config)).description
    config.other_findings = False
    assert sum(map(len, _read(config).values())) == len(TASK_IMAGES)
    assert "not the paper's task" not in load_dataset(_named(config)).description


@pytest.mark.parametrize("name", ["dataset_info.json", "metadata.json"])
def test_a_damaged_description_names_folder_and_cure(config, name):
    make_download(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    path = pathlib.Path(chestxray14.create_builder(config).data_path) / name
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" + content[1:]):
        path.write_bytes(damaged)
        for use in (load_dataset, preparation.prepare):
            with pytest.raises(UserError, match="damaged.*Delete this folder") as caught:
                use(_named(config))
            assert str(path.parent) in str(caught.value)


def test_provenance(config):
    make_download(pathlib.Path(config.manual_dir))
    path = _find(config, "00000001_000.png")
    Image.open(path).convert("RGBA").save(path)
    chestxray14.prepare(config)
    provenance = chestxray14.load_provenance(chestxray14.create_builder(config))
    assert provenance["image_modes"] == {"L": 15, "RGBA": 1}
    assert provenance["source_sizes"] == {"64x64": 16}
    assert provenance["missing_images"] == provenance["duplicate_images"] == 0
    assert provenance["label_version"] == "v2020"
    assert not provenance["published_counts"]
    assert provenance["splits"]["dev"] == {"images": 3, "positives": 1, "negatives": 2, "other_findings": 0,
                                           "patients": provenance["splits"]["dev"]["patients"]}  # fmt: skip
    stored = _read(config)
    patients = {split: {record["patient"] for record in rows} for split, rows in stored.items()}
    assert provenance["shared_patients"] == {
        "train and dev": len(patients["train"] & patients["dev"]), "train and test": 0, "dev and test": 0,
    }  # fmt: skip
    text = chestxray14.describe_provenance(provenance)
    for part in ("Data_Entry_2017_v2020.csv", "RGBA 1", "patients shared by train and dev", "64x64 16"):
        assert part in text


def test_patient_split_is_disjoint(config):
    make_download(pathlib.Path(config.manual_dir))
    config.dev_split = "patient"
    chestxray14.prepare(config)
    stored = _read(config)
    dev, train = ({record["patient"] for record in stored[split]} for split in ("dev", "train"))
    assert dev and train and not dev & train


def test_the_bytes_depend_neither_on_the_number_of_workers_nor_on_the_process(config, tmp_path):
    make_download(pathlib.Path(config.manual_dir))
    written = []
    for num_workers in (1, 2):
        config.num_workers = num_workers
        config.data_dir = str(tmp_path / f"data{num_workers}")
        process = multiprocessing.get_context("spawn").Process(target=chestxray14.prepare, args=(config,))
        process.start()
        process.join()
        assert process.exitcode == 0
        folder = pathlib.Path(chestxray14.create_builder(config).data_dir)
        files = [path for path in folder.iterdir() if "array_record" in path.name or path.name == "metadata.json"]
        assert len(files) == 4
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1]


def test_small_shards_keep_every_row_once(config, monkeypatch):
    make_download(pathlib.Path(config.manual_dir))
    monkeypatch.setattr(chestxray14, "_SHARD_BYTES", 2 * 32 * 32)
    chestxray14.prepare(config)
    stored = _read(config)
    assert sorted(record["id"] for rows in stored.values() for record in rows) == TASK_IMAGES
    assert chestxray14.create_builder(config).info.splits["train"].num_shards == 5


def test_missing_images_are_an_error_unless_allowed(config):
    make_download(pathlib.Path(config.manual_dir))
    _find(config, "00000002_000.png").unlink()
    with pytest.raises(UserError, match=r"1 of 16 images are missing.*00000002_000\.png.*allow_missing"):
        chestxray14.prepare(config)
    assert chestxray14.find_prepared(config) is None
    config.allow_missing = True
    chestxray14.prepare(config)
    assert sum(map(len, _read(config).values())) == 15
    assert chestxray14.load_provenance(chestxray14.create_builder(config))["missing_images"] == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_unreadable_images_are_all_named_and_nothing_is_left(config, num_workers):
    make_download(pathlib.Path(config.manual_dir))
    config.num_workers = num_workers
    for name in ("00000001_000.png", "00000011_000.png"):
        path = _find(config, name)
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"(?s)2 of 16 images.*00000001_000\.png.*00000011_000\.png"):
        chestxray14.prepare(config)
    assert chestxray14.find_prepared(config) is None
    assert not list(pathlib.Path(config.data_dir).rglob("*array_record*"))


def test_an_interrupted_preparation_is_never_read(config):
    make_download(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    folder = pathlib.Path(chestxray14.create_builder(config).data_dir)
    folder.rename(folder.with_name("incomplete.ABC123_1.0.0"))  # as a killed run leaves it
    assert chestxray14.find_prepared(config) is None
    assert chestxray14.list_prepared(config) == []
    chestxray14.prepare(config)
    assert sum(map(len, _read(config).values())) == 16


def test_a_prepared_set_needs_no_download_and_is_not_made_twice(config):
    make_download(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    folder = pathlib.Path(chestxray14.create_builder(config).data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    chestxray14.prepare(config)
    shutil.rmtree(config.manual_dir)
    config.manual_dir = ""
    chestxray14.prepare(config)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert sum(map(len, _read(config).values())) == 16


def test_a_set_made_from_other_files_is_not_mistaken(config):
    root = pathlib.Path(config.manual_dir)
    make_download(root)
    chestxray14.prepare(config)
    write_images(root, size=48)
    with pytest.raises(UserError, match=r"made from other files: image_names.*config\.data\.data_dir"):
        chestxray14.prepare(config)
    write_images(root)
    chestxray14.prepare(config)
    (root / "Data_Entry_2017_v2020.csv").unlink()
    write_labels(root, "2017")
    with pytest.raises(UserError, match="label_file Data_Entry_2017_v2020.csv there, Data_Entry_2017.csv here"):
        chestxray14.prepare(config)


def test_every_choice_has_its_own_name(config):
    names = {chestxray14.create_builder(config).builder_config.name}
    for field, value in (("image_size", 48), ("dev_split", "patient"), ("dev_fraction", 0.3), ("split_seed", 1)):
        other = config.copy_and_resolve_references()
        other[field] = value
        names.add(chestxray14.create_builder(other).builder_config.name)
    assert len(names) == 5


def test_prepared_sets_are_listed(config):
    assert chestxray14.list_prepared(config) == []
    make_download(pathlib.Path(config.manual_dir))
    chestxray14.prepare(config)
    config.image_size = 48
    assert chestxray14.find_prepared(config) is None
    assert chestxray14.list_prepared(config) == ["32px_image_dev0.25_seed0"]


def test_odd_sizes_are_logged(config, monkeypatch):
    root = pathlib.Path(config.manual_dir)
    make_download(root)
    for name, shape in (("00000001_000.png", (60, 64)), ("00000002_000.png", (16, 16))):
        Image.fromarray(np.full(shape, 9, np.uint8)).save(_find(config, name))
    lines = []
    monkeypatch.setattr(chestxray14.log, "warning", lambda message, *args: lines.append(message % args))
    chestxray14.prepare(config)
    assert "1 images of 64x60 px are not square: squeezed to a square" in lines
    assert "1 images of 16x16 px were enlarged to 32 px" in lines


def test_bad_settings(config, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        chestxray14.prepare(config)
    config.manual_dir = ""
    with pytest.raises(UserError, match=r"config\.data\.manual_dir"):
        chestxray14.prepare(config)
    assert not (tmp_path / "data").exists()
    config.image_size = 0
    with pytest.raises(UserError, match=r"config\.data\.image_size=0"):
        chestxray14.create_builder(config)


def test_a_download_without_test_images(config):
    make_download(pathlib.Path(config.manual_dir))
    for name, (_, _, part) in IMAGES.items():
        if part == "test":
            _find(config, name).unlink()
    config.allow_missing = True
    with pytest.raises(UserError, match="test list"):
        chestxray14.prepare(config)


@pytest.mark.skipif(not (REAL / "chestxray14_meta").is_dir(), reason="the real metadata are not here")
def test_the_paper_s_dev_split_on_the_real_metadata(config, tmp_path, monkeypatch):
    meta = REAL / "chestxray14_meta"
    lists = {part: meta / f"{part}_list.txt" for part in ("train_val", "test")}
    (tmp_path / "any.png").touch()  # stands for every image: the split is drawn before any is opened
    found = {name: [tmp_path / "any.png"] for path in lists.values() for name in path.read_text().split()}
    download = Download(meta / "Data_Entry_2017_v2020.csv", meta / "BBox_List_2017.csv", lists, found)
    monkeypatch.setattr(nih_download, "find_download", lambda folders: download)
    config.dev_fraction = 0.1
    selection = chestxray14.select_images(chestxray14.create_builder(config).builder_config, str(tmp_path))
    counts = {split: (part["positives"], part["negatives"]) for split, part in selection.provenance["splits"].items()}
    assert counts == {"train": (1536, 45_450), "dev": (171, 5050), "test": (1069, 9861)}
    shared = selection.provenance["shared_patients"]
    assert shared["train and dev"] > 2000  # the price of the paper's image-level split
    assert shared["train and test"] == shared["dev and test"] == 0
    assert selection.provenance["published_counts"]


@pytest.mark.skipif(not (REAL / "chestxray14_128").is_dir(), reason="the real images are not here")
def test_a_slice_of_the_real_images(config, tmp_path):
    rng = np.random.default_rng(4)
    (tmp_path / "slice").mkdir()
    for path in rng.choice(sorted((REAL / "chestxray14_128/images").iterdir()), 300, replace=False):
        (tmp_path / "slice" / path.name).symlink_to(path)
    config.manual_dir = f"{REAL / 'chestxray14_meta'},{tmp_path / 'slice'}"
    config.image_size = 128
    config.allow_missing = True
    chestxray14.prepare(config)
    stored = [record for rows in _read(config).values() for record in rows]
    assert len(stored) == 300
    for record in stored[::37]:
        original = np.asarray(Image.open(tmp_path / "slice" / record["id"]))
        np.testing.assert_array_equal(record["image"][..., 0], original)
    folder = pathlib.Path(chestxray14.create_builder(config).data_dir)
    assert json.loads((folder / "metadata.json").read_text())["missing_images"] == 63_137 - 300
