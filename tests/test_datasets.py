"""Loading, index, fingerprint and damage, on a tiny builder; once end to end on the phantom."""

import logging
import os
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs.dense121 import get_config
from cxa_jax.data import chest_phantom, chestxray14, datasets
from cxa_jax.data.datasets import INDEX_FIELDS, INDEX_FILE, describe_splits, load_dataset, shared_patients
from cxa_jax.data.pipeline import make_eval_iterator, make_train_iterator, steps_per_epoch
from cxa_jax.data.records import record_features
from cxa_jax.errors import UserError

NUM_IMAGES = {"train": 30, "dev": 7, "test": 9}
SIDE = 16


def make_records(split: str, seed: int) -> list[dict]:
    """Records of patients with two images each; one patient of train is in dev as well."""
    rng = np.random.default_rng([seed, len(split)])
    return [
        {
            "image": rng.integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8),
            "id": f"{split}_{row:03d}.png",
            "patient": "shared" if split != "test" and row < 2 else f"{split}{row // 2}",
            "label": int(row % 5 == 0),
            "findings": "Cardiomegaly|Effusion" if row % 5 == 0 else "No Finding",
            "view": "PA" if row % 2 else "AP",
            "sex": "F" if row % 3 else "M",
            "age": 20 + row if row else -1,
            "boxes": np.full((int(row % 5 == 0), 4), row, np.float32),
        }
        for row in range(NUM_IMAGES[split])
    ]


class TinyXrays(tfds.core.GeneratorBasedBuilder):
    """Forty-six random images."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    seed = 0

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=record_features(SIDE, with_heart=False))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in NUM_IMAGES}

    def _generate_examples(self, split):
        for record in make_records(split, self.seed):
            yield record["id"], record


def prepare(folder: pathlib.Path) -> TinyXrays:
    builder = TinyXrays(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder


def make_config(folder: pathlib.Path, **changes):
    config = get_config().data
    config.update({"data_dir": str(folder), "image_size": SIDE} | changes)
    return config


@pytest.fixture
def builder(tmp_path, monkeypatch) -> TinyXrays:
    """The tiny builder in the place of a prepared ChestX-ray14."""
    builder = prepare(tmp_path)
    monkeypatch.setattr(chestxray14, "find_prepared", lambda _: builder)
    monkeypatch.setattr(chestxray14, "load_provenance", lambda _: {"missing_images": 0, "splits": {}})
    return builder


def shard(builder: TinyXrays, split: str) -> pathlib.Path:
    return pathlib.Path(builder.info.splits[split].filepaths[0])


@pytest.mark.parametrize("name", ["chestxray14", "auto"])
def test_prepared_data_are_loaded_with_their_index(builder, tmp_path, name):
    dataset = load_dataset(make_config(tmp_path, name=name))
    assert (dataset.name, dataset.is_phantom, dataset.image_size) == ("chestxray14", False, SIDE)
    assert list(dataset.splits) == ["train", "dev", "test"]
    for split in dataset.splits.values():
        expected = {record["id"]: record for record in make_records(split.name, 0)}
        assert len(split.source) == NUM_IMAGES[split.name]
        assert sorted(split.index["id"]) == sorted(expected)
        for row in range(len(split.source)):
            record = split.source[row]
            np.testing.assert_array_equal(split.read_image(row), record["image"])
            assert record.keys() == expected[record["id"]].keys()
            for field, value in expected[record["id"]].items():
                np.testing.assert_array_equal(record[field], value)
            for field in INDEX_FIELDS:
                assert split.index[field][row] == record[field]
        assert split.index["label"].dtype == np.int32 and split.index["age"].dtype == np.int32


def test_the_index_is_kept_and_read_back(builder, tmp_path, monkeypatch):
    config = make_config(tmp_path, name="chestxray14")
    first = load_dataset(config)
    files = os.listdir(builder.data_path)
    assert INDEX_FILE in files and not [name for name in files if name.startswith(".")]
    monkeypatch.setattr(datasets, "_compute_index", lambda *_: pytest.fail("the index was computed a second time"))
    second = load_dataset(config)
    assert second.fingerprint == first.fingerprint and len(first.fingerprint) == 64
    for split in first.splits:
        for field in INDEX_FIELDS:
            np.testing.assert_array_equal(second.splits[split].index[field], first.splits[split].index[field])
            assert second.splits[split].index[field].dtype == first.splits[split].index[field].dtype


def test_the_fingerprint_knows_pixels_and_not_the_place(tmp_path, monkeypatch):
    def fingerprint_of(folder: str, seed: int) -> str:
        monkeypatch.setattr(TinyXrays, "seed", seed)
        builder = prepare(tmp_path / folder)
        monkeypatch.setattr(chestxray14, "find_prepared", lambda _: builder)
        monkeypatch.setattr(chestxray14, "load_provenance", lambda _: {"missing_images": 0, "splits": {}})
        return load_dataset(make_config(tmp_path / folder, name="chestxray14")).fingerprint

    assert fingerprint_of("a", 0) == fingerprint_of("b", 0)
    assert fingerprint_of("a", 0) != fingerprint_of("c", 1)


def test_an_index_of_other_records_is_not_believed(builder, tmp_path):
    config = make_config(tmp_path, name="chestxray14")
    expected = load_dataset(config).fingerprint
    path = builder.data_path / INDEX_FILE
    with np.load(path) as archive:
        stale = dict(archive) | {"identity": np.array("{}"), "fingerprint": np.array("stale")}
    np.savez(path, **stale)
    assert load_dataset(config).fingerprint == expected


def test_an_index_is_not_believed_once_the_set_says_it_was_made_of_other_labels(builder, tmp_path):
    """Labels of one length make shards of one size."""
    config = make_config(tmp_path, name="chestxray14")
    load_dataset(config)
    path = pathlib.Path(builder.data_path)
    (path / "metadata.json").write_text('{"label_sha256": "another"}')
    with np.load(path / INDEX_FILE) as archive:
        before = str(archive["identity"])
    load_dataset(config)
    with np.load(path / INDEX_FILE) as archive:
        assert str(archive["identity"]) != before


def test_a_broken_index_is_computed_anew(builder, tmp_path):
    config = make_config(tmp_path, name="chestxray14")
    expected = load_dataset(config).fingerprint
    path = pathlib.Path(builder.data_path / INDEX_FILE)
    for content in (path.read_bytes()[:100], b"", b"text"):
        path.write_bytes(content)
        assert load_dataset(config).fingerprint == expected


def test_an_index_that_cannot_be_kept_is_no_error(builder, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only folder")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(load_dataset(make_config(tmp_path, name="chestxray14")).splits["dev"].source) == 7


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "altered"])
def test_damaged_records_name_folder_and_cure(builder, tmp_path, damage, is_indexed):
    config = make_config(tmp_path, name="chestxray14")
    if is_indexed:
        load_dataset(config)
    path = shard(builder, "train")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        flipped = bytearray(content)
        flipped[5000] ^= 255
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "altered": bytes(flipped)}[damage])
    with pytest.raises(UserError, match="damaged.*Delete this folder.*--mode=prepare") as caught:
        dataset = load_dataset(config)
        # Altered bytes of the same length are found when they are read, at the latest.
        list(make_eval_iterator(dataset.splits["train"], batch_size=4, num_threads=1))
    assert str(builder.data_path) in str(caught.value)


def test_an_index_altered_anywhere_is_computed_anew(builder, tmp_path):
    config = make_config(tmp_path, name="chestxray14")
    fingerprint = load_dataset(config).fingerprint
    path = pathlib.Path(builder.data_path) / datasets.INDEX_FILE
    content, rng = path.read_bytes(), np.random.default_rng(4)
    for place in rng.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        assert load_dataset(config).fingerprint == fingerprint


def test_a_split_that_is_not_recorded_is_damage(builder, tmp_path):
    os.remove(builder.data_path / "dataset_info.json")
    fresh = TinyXrays(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(UserError, match="does not know the split 'train'"):
        datasets._open(fresh, "chestxray14", "")


def test_unprepared_real_data_tell_the_command_and_what_is_there(tmp_path):
    other = tmp_path / "chestxray14/128px_image_dev0.1_seed0" / str(chestxray14.ChestXray14.VERSION)
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    config = make_config(tmp_path, name="chestxray14", image_size=96)
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    for part in ("--mode=prepare", "--config.data.manual_dir=", "image_size=96", "128px_image", str(tmp_path)):
        assert part in str(caught.value)


def test_auto_falls_back_to_the_phantom_and_says_so(tmp_path, monkeypatch, caplog):
    prepared = []
    monkeypatch.setattr(chest_phantom, "prepare", prepared.append)
    monkeypatch.setattr(chest_phantom, "create_builder", lambda _: prepare(tmp_path))
    config = make_config(tmp_path, name="auto")
    with caplog.at_level(logging.INFO, logger="cxa_jax"):
        dataset = load_dataset(config)
    assert prepared == [config]
    assert dataset.is_phantom and dataset.name == "chest_phantom"
    for text in (caplog.text, dataset.description):
        assert "phantom" in text and "--mode=prepare" in text and "X-rays of patients" in text


def test_unknown_name_lists_the_choices(tmp_path):
    with pytest.raises(UserError, match="'mnist'.*auto, chestxray14, chest_phantom, image_folder"):
        load_dataset(make_config(tmp_path, name="mnist"))


def test_table_and_shared_patients(builder, tmp_path):
    dataset = load_dataset(make_config(tmp_path, name="chestxray14"))
    rows = [line.split() for line in describe_splits(dataset).splitlines()]
    assert rows[0] == ["split", "images", "positives", "prevalence", "patients"]
    assert rows[1] == ["train", "30", "6", "20.00%", "15"]
    assert rows[2] == ["dev", "7", "2", "28.57%", "4"]
    assert rows[3] == ["test", "9", "2", "22.22%", "5"]
    assert shared_patients(dataset) == {("train", "dev"): 1, ("train", "test"): 0, ("dev", "test"): 0}


def test_phantom_end_to_end(tmp_path):
    config = make_config(tmp_path, name="chest_phantom", image_size=32, num_threads=2, num_workers=1)
    config.phantom.num_patients = 20
    dataset = load_dataset(config)
    assert dataset.is_phantom and dataset.image_size == 32
    assert set(shared_patients(dataset).values()) == {0}
    train = dataset.splits["train"]
    seen = []
    iterator = make_train_iterator(train, config, batch_size=4, seed=0)
    for _ in range(steps_per_epoch(train, config, 4)):
        batch = next(iterator)
        assert batch["image"].shape == (4, 32, 32, 1) and batch["image"].dtype == np.uint8
        seen += batch["index"][batch["mask"]].tolist()
    assert sorted(seen) == list(range(len(train.source)))
    again = load_dataset(config)
    assert again.fingerprint == dataset.fingerprint
