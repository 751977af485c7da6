"""The stored phantoms: the same bytes from any number of workers, whole or not at all, and found by their name."""

import hashlib
import pathlib

import numpy as np
import pytest

from configs.dense121 import get_config
from cxa_jax.data import chest_phantom, phantom_render
from cxa_jax.data.chest_phantom import create_builder, prepare
from cxa_jax.data.phantom import PhantomSpec
from cxa_jax.data.records import decode
from cxa_jax.errors import UserError

SIZE = 32


def make_config(folder, **phantom):
    config = get_config().data
    config.data_dir, config.image_size, config.num_workers = str(folder), SIZE, 1
    config.phantom.num_patients = 24
    config.phantom.update(phantom)
    return config


def read(config):
    builder = create_builder(config)
    return {split: [decode(record) for record in builder.as_data_source(split)] for split in ("train", "dev", "test")}


def hash_files(folder):
    files = sorted(pathlib.Path(folder).rglob("*.array_record*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("phantom"), label_noise=0.1)
    prepare(config)
    return config


def test_records_are_the_drawings(prepared):
    values = prepared.phantom
    spec = PhantomSpec(values.preset, values.prevalence, values.label_noise, values.seed)
    num_records = 0
    for records in read(prepared).values():
        assert [record["id"] for record in records] == sorted(record["id"] for record in records)
        for record in records:
            patient, image = record["id"].removeprefix("phantom").split("_")
            drawing = phantom_render.draw(spec, SIZE, (int(patient), int(image)))
            np.testing.assert_array_equal(record["image"], drawing.image[..., None])
            np.testing.assert_array_equal(record["heart_mask"], drawing.heart_mask[..., None])
            np.testing.assert_array_equal(record["boxes"], np.array([drawing.box], np.float32))
            assert record["image"].dtype == record["heart_mask"].dtype == np.uint8
            assert record["patient"] == f"phantom{patient}"
            assert record["label"] == drawing.latents.label
            assert record["findings"] == ("Cardiomegaly" if record["label"] else "No Finding")
            assert record["ctr"] == np.float32(drawing.latents.ctr)
            assert record["view"] in ("PA", "AP") and record["sex"] in ("F", "M") and 20 <= record["age"] <= 90
            num_records += 1
    assert 24 <= num_records <= 96


def test_another_box_is_another_set_of_the_same_images(prepared, tmp_path):
    assert create_builder(prepared).builder_config.name == "hard_32px_24patients_prevalence0.3_noise0.1_seed0"
    config = make_config(tmp_path, label_noise=0.1, box="radiologist")
    prepare(config)
    wider = 0
    for ours, theirs in zip(read(config).values(), read(prepared).values(), strict=True):
        for record, other in zip(ours, theirs, strict=True):
            assert {name for name in record if not np.array_equal(record[name], other[name])} <= {"boxes"}
            wider += not np.array_equal(record["boxes"], other["boxes"])
    assert wider > 10
    assert create_builder(config).builder_config.name.endswith("_seed0_radiologist_boxes")


def test_splits_share_no_patient_and_hold_both_classes(prepared):
    splits = read(prepared)
    patients = [{record["patient"] for record in records} for records in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 24
    assert all({record["label"] for record in records} == {0, 1} for records in splits.values())


def test_bytes_do_not_depend_on_the_workers(prepared, tmp_path):
    config = make_config(tmp_path, label_noise=0.1)
    config.num_workers = 2
    prepare(config)
    assert hash_files(tmp_path) == hash_files(prepared.data_dir)
    assert len(hash_files(tmp_path)) == 3


def test_preparing_again_draws_nothing(prepared, monkeypatch):
    monkeypatch.setattr(phantom_render, "draw", None)
    before = hash_files(prepared.data_dir)
    prepare(prepared)
    assert hash_files(prepared.data_dir) == before


def test_an_interrupted_set_is_not_picked_up(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    draw, drawn = phantom_render.draw, []

    def draw_until_interrupted(spec, size, key, box):
        drawn.append(key)
        if len(drawn) > 20:
            raise KeyboardInterrupt
        return draw(spec, size, key, box)

    monkeypatch.setattr(phantom_render, "draw", draw_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert not create_builder(config).is_prepared()
    monkeypatch.setattr(phantom_render, "draw", draw)
    prepare(config)
    assert create_builder(config).is_prepared()
    assert len(read(config)["train"]) > 15


def test_several_shards_hold_the_same_records(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(chest_phantom, "_SHARD_BYTES", 2 * SIZE**2 * 10)
    config = make_config(tmp_path, label_noise=0.1)
    prepare(config)
    assert len(hash_files(tmp_path)) > 3
    for ours, theirs in zip(read(config).values(), read(prepared).values(), strict=True):
        assert [record["image"].tobytes() for record in ours] == [record["image"].tobytes() for record in theirs]


def test_name_holds_all_that_shapes_the_bytes(tmp_path):
    changes = [
        {},
        {"preset": "easy"},
        {"num_patients": 25},
        {"prevalence": 0.3000001},
        {"label_noise": 0.05},
        {"seed": 1},
        {"box": "radiologist"},
    ]
    names = {create_builder(make_config(tmp_path, **change)).builder_config.name for change in changes}
    assert len(names) == len(changes)
    other_size = make_config(tmp_path)
    other_size.image_size = 33
    assert create_builder(other_size).builder_config.name not in names
    assert all(name.startswith(("hard_32px_", "easy_32px_")) for name in names)
    natural = [make_config(tmp_path, preset="natural", prevalence=value) for value in (0.2, 0.4)]
    assert len({create_builder(config).builder_config.name for config in natural}) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("phantom.preset", "medium"),
        ("phantom.box", "tight"),
        ("phantom.prevalence", 0.0),
        ("phantom.prevalence", 1.0),
        ("phantom.prevalence", float("nan")),
        ("phantom.label_noise", -0.1),
        ("phantom.label_noise", 0.5),
        ("phantom.num_patients", 19),
        ("phantom.seed", -1),
        ("image_size", 31),
        ("image_size", 1025),
        ("num_workers", -1),
    ],
)
def test_bad_parameters_are_named(tmp_path, field, value):
    config = make_config(tmp_path)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.data.{field}="):
        create_builder(config)


def test_too_few_positives_write_nothing(tmp_path):
    with pytest.raises(UserError, match="num_patients"):
        prepare(make_config(tmp_path, prevalence=0.001))
    assert not any(tmp_path.iterdir())
