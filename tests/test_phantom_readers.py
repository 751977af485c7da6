"""Readers of boxes in a run: fitted on a phantom's dev positives, one more rule of its test, taken over for X-rays."""

import csv
import dataclasses

import numpy as np
import pytest
import tiny

from cxa_jax import outputs
from cxa_jax import run as run_module
from cxa_jax.box_reader import fit_readers, save_readers
from cxa_jax.evaluate import evaluate_split
from cxa_jax.localization_table import RANDOM_WEIGHTS, READER, summarize_tables
from cxa_jax.map_controls import draw_controls, predict_with_random_weights
from cxa_jax.map_evaluation import collect_maps, find_boxed_images
from cxa_jax.phantom_readers import READERS_FILE, describe_readers, find_readers, fit_phantom_readers
from cxa_jax.report_localization import RULE_NAMES, tabulate_localization
from cxa_jax.scored_maps import THUMBNAIL
from cxa_jax.thumbnail import compute_thumbnail_features

MAPS = ("attention", "weights", "evidence", "cam", "grad_cam")


@pytest.fixture(scope="module")
def run():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
        return run_module.create_run(tiny.make_config())


@pytest.fixture(scope="module")
def predicted(run):
    variables = run.create_state().variables
    return {
        name: evaluate_split(run.test_step, variables, run.dataset.splits[name], run.mesh, batch_size=8, num_threads=0)
        for name in ("dev", "test")
    }


@pytest.fixture(scope="module")
def controls(run):
    return draw_controls(run, run.create_state().variables)


@pytest.fixture(scope="module")
def maps(run, predicted, controls):
    return collect_maps(run, predicted["dev"], find_boxed_images(run.dataset.splits["dev"]), controls)


@pytest.fixture(scope="module")
def fitted(run, predicted, maps):
    return fit_phantom_readers(run, predicted["dev"], find_boxed_images(run.dataset.splits["dev"]), maps)


def as_xrays(run, **fields):
    dataset = dataclasses.replace(run.dataset, name="chestxray14")
    return dataclasses.replace(run, config=tiny.make_config(**fields), dataset=dataset)


def test_they_are_fitted_on_the_positives_of_dev_alone(run, predicted, controls, maps, fitted):
    dev, split = predicted["dev"], run.dataset.splits["dev"]
    rows = np.flatnonzero(dev.label == 1)
    random = predict_with_random_weights(run, controls.random_weights, "dev", rows)
    read = {name: getattr(dev, name)[rows] for name in MAPS}
    read |= {f"{RANDOM_WEIGHTS}_{name}": values for name, values in random.items() if name in MAPS}  # no products
    assert not np.allclose(read[f"{RANDOM_WEIGHTS}_evidence"], read["evidence"])
    images = np.stack([split.source[row]["image"] for row in rows])
    read[THUMBNAIL] = compute_thumbnail_features(images, (2, 2)).reshape(-1, 2, 2)
    boxes = np.array([split.source[row]["boxes"][0] for row in rows])
    expected = fit_readers(read, boxes, dev.index["patient"][rows], tiny.SIZE)
    assert describe_readers(fitted) == describe_readers(expected)
    for name, reader in expected.items():
        np.testing.assert_allclose(fitted[name].center, reader.center, rtol=1e-6)
    assert fitted["evidence"].num_images == len(rows) < len(dev.label)
    assert fit_phantom_readers(as_xrays(run), dev, find_boxed_images(split), maps) is None


def test_they_are_one_more_rule_of_a_test(run, predicted, controls, fitted, tmp_path):
    readers = find_readers(run, predicted["test"], fitted)
    dev, test, boxed = predicted["dev"].to_table(), predicted["test"], find_boxed_images(run.dataset.splits["test"])
    table = outputs.save_localization(run, dev, test, tmp_path, boxed, None, controls, readers).table
    rows = {name for name, rule in table.scores if rule == READER}
    together = {"all_maps", "thumbnail_and_maps"}
    own = {*MAPS, *together}
    assert rows == own | {f"{RANDOM_WEIGHTS}_{name}" for name in own} | {"thumbnail", "median_box"}
    assert table.scores["evidence", READER].iou.min() > 0.999  # all tiny boxes are one box
    with (tmp_path / "localization_test.csv").open() as file:
        assert READER in {row["rule"] for row in csv.DictReader(file)}
    summary = summarize_tables([table], num_resamples=20, seed=0) | {"threshold_free": [None]}
    groups = [{"name": "tiny", "runs": ["tiny"], "localization": summary}]
    page = {found.title: found for found in tabulate_localization({"groups": groups, "phantom": True})}
    shown = page[f"Localisation, all boxed positives, boxes by {RULE_NAMES[READER]}"]
    assert {"mean IoU", "less the median box's"} <= set(shown.head)
    names = [row[1] for row in shown.rows]
    assert len(set(names)) == len(names) == len(own) + 2 and "all maps together" in names
    beside = page[f"Maps less their controls, all boxed positives, boxes by {RULE_NAMES[READER]}"]
    pairs = {(row[1], row[2]) for row in beside.rows}
    titles = {"the median box of other patients", "the image's thumbnail", "the map of random weights"}
    assert pairs == {(name, title) for name in set(names[: len(own)]) for title in titles}


def test_positives_of_one_patient_fit_nothing(run, predicted, maps):
    boxed = find_boxed_images(run.dataset.splits["dev"])
    assert fit_phantom_readers(run, predicted["dev"], dataclasses.replace(boxed, rows=boxed.rows[:1]), maps) is None


def test_xrays_take_the_readers_of_a_phantom_run(run, predicted, fitted, tmp_path, caplog):
    test, phantoms = predicted["test"], tmp_path / "phantoms"
    assert find_readers(as_xrays(run), test, None) == {}
    caplog.set_level("INFO")
    for field in ("eval.levels_run", "init.run"):
        assert find_readers(as_xrays(run, **{field: str(phantoms)}), test, None) == {}
        assert "box_readers.npz is not there" in caplog.text
        caplog.clear()
    phantoms.mkdir()
    save_readers(phantoms / READERS_FILE, fitted)
    for field in ("eval.levels_run", "init.run"):
        xrays = as_xrays(run, **{field: str(phantoms)})
        found = find_readers(xrays, test, None)
        assert describe_readers(found) == describe_readers(fitted)
    assert not caplog.text
    finer = dataclasses.replace(test, attention=np.zeros((19, 4, 4)))
    assert find_readers(xrays, finer, None) == {}
    assert "fitted on maps of 2x2 cells, and these have 4x4" in caplog.text
    caplog.clear()
    assert find_readers(xrays, dataclasses.replace(test, cam=None), None) == {}
    assert "these are attention, evidence, grad_cam" in caplog.text and "same pooling and head" in caplog.text
    caplog.clear()
    (phantoms / READERS_FILE).write_bytes(b"")
    assert find_readers(xrays, test, None) == {} and "cannot be read" in caplog.text
