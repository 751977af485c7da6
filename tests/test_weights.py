"""A weights file is the run that it came from: the same object, the same table; by name, by file, in three lines."""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import saved_run
import tiny
from conftest import QUICK_FLAGS
from PIL import Image
from scipy.special import expit
from test_weights_file import rewrite

import cxa_jax
from cxa_jax import weights_export, weights_registry
from cxa_jax.companion_files import COMPANIONS, StoredFolder
from cxa_jax.data.datasets import load_dataset
from cxa_jax.data.input_statistics import load_input_statistics
from cxa_jax.errors import UserError
from cxa_jax.export import export
from cxa_jax.predict import predict
from cxa_jax.trained_network import load_trained_network
from cxa_jax.weights import load_weights
from cxa_jax.weights_file import read_weights
from cxa_jax.workdir import flatten_config

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved run with paths of this machine in its config: the run, its variables, its workdir."""
    workdir = tmp_path_factory.mktemp("workdir")
    fields = {"data.data_dir": str(workdir / "prepared"), "data.folder.table": str(workdir / "mine.csv")}
    return *saved_run.save_run(workdir, **fields), workdir


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    """The run's weights file; its dev images are not at hand."""
    return export(str(run[2]), str(tmp_path_factory.mktemp("weights") / "deep" / "tiny.safetensors"))


@pytest.fixture(scope="module")
def network(path):
    return load_weights(str(path))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng()
    return [rng.integers(0, 256, shape, np.uint8) for shape in ((64, 64), (100, 80), (31, 200), (64, 64), (300, 300))]


@pytest.fixture
def registry(path, tmp_path, monkeypatch):
    """A folder weights/ with one network, called tiny."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(path.with_suffix(suffix), tmp_path)
    monkeypatch.setattr(weights_registry, "FOLDER", tmp_path)
    return tmp_path


def test_is_the_network_of_the_workdir(run, network, path):
    own = load_trained_network(str(run[2]))
    for field in (
        "normalization",
        "num_copies",
        "threshold",
        "threshold_origin",
        "calibration",
        "is_phantom",
        "box_rule",
        "model",
    ):
        assert getattr(network, field) == getattr(own, field), field
    assert network.threshold == saved_run.THRESHOLD and vars(network.calibration) == saved_run.PLATT
    assert jax.tree.all(jax.tree.map(np.array_equal, network.variables, own.variables))
    changed = {"data.data_dir": "prepared", "data.folder.table": "mine.csv"}
    assert flatten_config(network.config) == flatten_config(own.config) | changed
    assert network.meta["fingerprint"] == own.meta["fingerprint"] and network.meta["progress"]["best_step"] == 0
    theirs, ours = (load_input_statistics(one.folder) for one in (network, own))
    np.testing.assert_array_equal(theirs.thumbnail, ours.thumbnail)
    assert theirs.ranges == ours.ranges and theirs.num_images == ours.num_images
    assert str(run[2]).encode() not in path.read_bytes()  # no path of the machine that trained


def test_predicts_the_same_table_and_pictures(run, path, images, tmp_path):
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    inputs = [str(tmp_path / "*.png")]
    folders = [
        predict(str(run[2]), inputs, str(tmp_path / "by_workdir")),
        predict(None, inputs, str(tmp_path / "by_file"), str(path)),
        predict(None, inputs, str(tmp_path / "by_workdir_named_as_weights"), str(run[2])),
    ]
    names = ["predictions.csv", *(str(picture.relative_to(folders[0])) for picture in folders[0].rglob("*.png"))]
    assert len(names) == 1 + len(images) + 1
    for folder in folders[1:]:
        for name in names:
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes(), name
    summary = json.loads((folders[1] / "summary.json").read_text())
    assert summary["network"] == str(path) and summary["compared_with_training_images"] == 44
    # and the call from Python says the same of images that Pillow resized
    with (folders[1] / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    out = load_weights(str(path)).predict(images)
    np.testing.assert_array_equal(out["logit"], np.array([row["logit"] for row in rows], np.float32))
    np.testing.assert_array_equal(out["score"], [float(row["score"]) for row in rows])
    np.testing.assert_array_equal(out["calibrated_score"], [float(row["calibrated_score"]) for row in rows])
    assert [row["decision"] == "cardiomegaly" for row in rows] == out["is_positive"].tolist()


def test_predicts_arrays_of_any_size_and_number(run, network, images):
    live, variables, _ = run
    many = np.stack([images[0], images[3]] * 10)  # more than config.eval.batch_size
    out = network.predict(many)
    want = [live.test_step(variables, many[rows][..., None]) for rows in (slice(0, 8), slice(8, 16))]
    for name in ("logit", "attention", "evidence"):
        np.testing.assert_allclose(out[name][:16], np.concatenate([w[name] for w in want]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(out[name][16:], out[name][:4])
    np.testing.assert_array_equal(out["score"], expit(out["logit"].astype(np.float64)))
    assert out["attention"].shape == (20, 2, 2) and len({logit for logit in out["logit"].tolist()}) == 2
    uncalibrated = dataclasses.replace(network, calibration=None).predict(many[:8])
    assert uncalibrated["calibrated_score"] is None


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 64, 64), np.uint8), "there are no images"),
        (np.zeros((64, 64), np.uint8), r"image 0 is uint8 \[64\]"),
        (np.zeros((2, 64, 64), np.float32), r"image 0 is float32 \[64, 64\]"),
        (np.zeros((2, 64, 64, 1), np.uint8), r"image 0 is uint8 \[64, 64, 1\]"),
        ([np.zeros((9, 9), np.uint8), np.zeros((0, 9), np.uint8)], "image 1 is uint8"),
    ],
)
def test_arrays_that_are_no_images(network, images, message):
    with pytest.raises(UserError, match=message):
        network.predict(images)


def test_without_dev_images_parameters_stay_float32_and_say_why(run, tmp_path, caplog):
    told = read_weights(export(str(run[2]), str(tmp_path / "a.safetensors"))).description
    assert told["dtype"] == "float32" and told["largest_logit_difference"] is None and told["views"] is None
    assert "float16 cannot be measured: its phantoms are not in config.data.data_dir" in caplog.text
    assert told["dtype_reason"] == "the run's dev images were not at hand to measure float16 on"


@pytest.mark.parametrize("allowed, dtype", [(0.01, "float16"), (1e-9, "float32")])
def test_float16_where_dev_stays_close(run, tmp_path, monkeypatch, caplog, allowed, dtype):
    live, variables, workdir = run
    monkeypatch.setattr(weights_export, "open_run_data", lambda network: tiny.make_dataset())
    monkeypatch.setattr(weights_export, "MAX_LOGIT_DIFFERENCE", allowed)
    with caplog.at_level("INFO"):
        path = export(str(workdir), str(tmp_path / "a.safetensors"))
    split = live.dataset.splits["dev"]
    images = np.zeros((16, 64, 64, 1), np.uint8)
    images[:13] = [split.read_image(row) for row in range(13)]
    halved = variables | {"params": jax.tree.map(lambda leaf: leaf.astype(np.float16), variables["params"])}
    halved = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), halved)
    logits = [
        np.concatenate([live.test_step(each, images[rows])["logit"] for rows in (slice(0, 8), slice(8, 16))])[:13]
        for each in (variables, halved)
    ]
    told = read_weights(path).description
    want = np.abs(logits[0].astype(np.float64) - logits[1]).max()
    assert 1e-6 < told["largest_logit_difference"] == pytest.approx(want, rel=0.1, abs=2e-6)
    assert told["dtype"] == dtype and told["views"] == {"PA": 44}
    assert f"parameters are {dtype}: in float16 the logits of 13 dev images differ" in caplog.text
    stored = load_weights(str(path)).variables
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, halved if dtype == "float16" else variables))


def test_only_the_runs_own_data_are_measured_on(tmp_path):
    data = tiny.make_config(**{"data.name": "auto", "data.data_dir": str(tmp_path), "data.phantom.num_patients": 20,
                               "data.image_size": 32, "data.num_workers": 1}).data  # fmt: skip
    config = types.SimpleNamespace(data=data)
    network = types.SimpleNamespace(config=config, is_phantom=True, meta={"fingerprint": "another's"})
    with pytest.raises(UserError, match="phantoms are not in"):
        weights_export.open_run_data(network)
    xrays = types.SimpleNamespace(config=config, is_phantom=False, meta=network.meta)
    with pytest.raises(UserError, match="prepare"):  # never drawings in place of X-rays
        weights_export.open_run_data(xrays)
    assert not list(tmp_path.iterdir())  # nothing was drawn
    named = data.copy_and_resolve_references().unlock()
    named.name = "chest_phantom"
    drawn = load_dataset(named)
    with pytest.raises(UserError, match="are others than those it was trained on"):
        weights_export.open_run_data(network)
    network.meta["fingerprint"] = drawn.fingerprint
    assert weights_export.open_run_data(network).fingerprint == drawn.fingerprint


def test_the_reference_beside_it_is_right(run, path):
    live, variables, _ = run
    reference = json.loads(path.with_suffix(".json").read_text())
    assert reference["file"] == path.name
    assert reference["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    drawn = weights_export.draw_phantoms()
    assert drawn.shape == (3, 256, 256) and drawn.dtype == np.uint8
    small = [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)) for image in drawn]
    out = live.test_step(variables, np.stack([*small, *small[:1]])[..., None])
    phantoms = reference["phantoms"]
    np.testing.assert_allclose(phantoms["logits"], out["logit"][:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(phantoms["scores"], expit(np.asarray(out["logit"][:3], np.float64)), rtol=1e-4)
    np.testing.assert_allclose(phantoms["mean_attention"], np.mean(out["attention"][:3], (1, 2)), rtol=1e-4)
    assert phantoms["images_sha256"] == hashlib.sha256(drawn.tobytes()).hexdigest()


def test_a_name_stands_for_its_file(registry, network):
    assert weights_registry.list_names() == ["tiny"]
    named = load_weights("tiny")
    assert named.source == registry / "tiny.safetensors"
    assert jax.tree.all(jax.tree.map(np.array_equal, named.variables, network.variables))


def test_wrong_names_and_digests(registry, monkeypatch):
    shutil.copy(registry / "tiny.json", registry / "other.json")
    for weights in ("tinny", "runs/nothing", str(registry / "none.safetensors"), ""):
        with pytest.raises(UserError, match="--weights=.* give one of the names other, tiny, a .safetensors file or"):
            weights_registry.find_weights(weights)
    with pytest.raises(UserError, match=r"other\.safetensors is missing"):
        load_weights("other")
    content = (registry / "tiny.safetensors").read_bytes()
    (registry / "tiny.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"not the file that tiny\.json describes: its SHA-256 is [0-9a-f]{64}, not"):
        load_weights("tiny")
    (registry / "tiny.json").write_text("{}")
    with pytest.raises(UserError, match=r"tiny\.json cannot be read"):
        load_weights("tiny")
    monkeypatch.setattr(weights_registry, "FOLDER", registry / "nowhere")
    with pytest.raises(UserError, match="there are none in"):
        load_weights("tiny")


def test_one_network_is_asked_for_and_written_where_it_may(path, tmp_path, monkeypatch, images):
    with pytest.raises(UserError, match="--workdir and --weights both"):
        predict("runs/a", ["a.png"], None, "nih128")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(images[0]).save("a.png")
    assert predict(None, ["a.png"], None, str(path)) == tmp_path / "runs" / "predict-tiny"
    assert sorted(other.name for other in path.parent.iterdir()) == ["tiny.json", "tiny.safetensors"]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model.backbone": "vgg"}, "config.model.backbone='vgg'"),
        ({"model.backbone": None}, "config.model.backbone is None"),
        ({"model.pooling": "gap"}, "amm/.* has no place"),
        ({"model.from_the_future": 1}, "config.model.from_the_future"),
        ({"data.image_size": 10**9}, "config.data.image_size=1000000000"),
        ({"data.image_size": "large"}, "config.data.image_size='large'"),
        ({"eval.num_copies": 0}, "config.eval.num_copies=0"),
    ],
)
def test_a_config_of_another_network(path, tmp_path, config, message):
    shutil.copy(path, tmp_path / "a.safetensors")
    told = read_weights(path).description["config"]
    rewrite(tmp_path / "a.safetensors", config=told | config)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(str(tmp_path / "a.safetensors"))
    assert "a.safetensors" in str(caught.value)


def test_companions_are_read_as_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="input_statistics"):
        (StoredFolder(tmp_path, {}) / "input_statistics.json").read_text()
    assert load_input_statistics(StoredFolder(tmp_path, {})) is None
    damaged = StoredFolder(tmp_path / "a.safetensors", {"input_statistics.json": {"thumbnail": [1]}})
    with pytest.raises(UserError, match=r"a\.safetensors: input_statistics\.json is damaged"):
        load_input_statistics(damaged)


def test_every_companion_travels(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[2], workdir)
    for number, name in enumerate(COMPANIONS[1:]):
        (workdir / name).write_text(json.dumps({"number": number, "ü": [0.1, None]}))
    folder = load_weights(str(export(str(workdir), str(tmp_path / "a.safetensors")))).folder
    for name in COMPANIONS:
        assert json.loads((folder / name).read_text(encoding="utf-8")) == json.loads((workdir / name).read_text())
    (workdir / COMPANIONS[-1]).write_text("{")
    with pytest.raises(UserError, match=f"{COMPANIONS[-1]} is damaged"):
        export(str(workdir), str(tmp_path / "b.safetensors"))
    assert not (tmp_path / "b.safetensors").exists()


def test_three_lines_from_anywhere(path, images, tmp_path):
    """As a program of its own: importing the package loads neither jax nor numpy."""
    np.save(tmp_path / "images.npy", np.stack([images[0], images[3]]))
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import cxa_jax
assert not {{"jax", "numpy", "flax"}} & set(sys.modules)
import numpy as np, tiny
network = cxa_jax.load_weights({str(path)!r})
out = network.predict(np.load("images.npy"))
print(out["score"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ | {"XLA_FLAGS": QUICK_FLAGS},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = cxa_jax.load_weights(str(path)).predict([images[0], images[3]])["score"]
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), here, rtol=1e-4)
