"""What a run leaves: evaluation rows, losses, the report against scikit-learn, pictures, another test size."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
import tiny
from sklearn.metrics import log_loss, roc_auc_score

from cxa_jax import figures, map_evaluation, map_levels, outputs, run_metrics, summary
from cxa_jax import run as run_module
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions, compute_loss, evaluate_split
from cxa_jax.localization import score_maps
from cxa_jax.metric_writer import write_history
from cxa_jax.workdir import to_json


@pytest.fixture(scope="module")
def run():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
        return run_module.create_run(tiny.make_config())


@pytest.fixture(scope="module")
def predicted(run):
    variables = run.create_state().variables
    return {
        name: evaluate_split(run.eval_step, variables, run.dataset.splits[name], run.mesh, batch_size=8, num_threads=0)
        for name in ("dev", "test")
    }


def test_every_image_once_and_no_padding(run, predicted):
    """19 images in batches of 8; each row must be what its image gives alone."""
    split, test = run.dataset.splits["test"], predicted["test"]
    assert len(test.logit) == 19
    image = np.repeat(split.source[17]["image"][None], 8, axis=0)
    alone = run.eval_step(run.create_state().variables, image)
    np.testing.assert_allclose(test.logit[17], alone["logit"][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(test.attention[17], alone["attention"][0], rtol=1e-4, atol=1e-5)


def make_predictions(seed: int, num_images: int = 40) -> Predictions:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num_images).astype(np.int32)
    logit = (rng.normal(size=num_images) + label).astype(np.float32)
    maps = rng.random((num_images, 2, 2)).astype(np.float32)
    patient = np.array([f"p{i // 2}" for i in range(num_images)])
    index = {"id": np.arange(num_images).astype(str), "patient": patient}
    return Predictions("test", index, label, logit, maps, maps - 0.5, maps)


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_scikit_learns(seed):
    predictions = make_predictions(seed)
    expected = log_loss(predictions.label, predictions.score)
    assert compute_loss(predictions) == pytest.approx(expected, rel=1e-6)
    weights = np.where(predictions.label == 1, 3.0, 0.5)
    each = -np.log(np.where(predictions.label == 1, predictions.score, 1 - predictions.score))
    assert compute_loss(predictions, (0.5, 3.0)) == pytest.approx(np.mean(weights * each), rel=1e-6)


def test_numbers_of_a_run(run, predicted, tmp_path):
    dev, test = predicted["dev"], predicted["test"]
    tuned = map_levels.tune_levels(run, dev, map_evaluation.find_boxed_images(run.dataset.splits["dev"]))
    levels = map_levels.find_levels(run, tuned)
    boxes = outputs.save_localization(run, dev.to_table(), test, tmp_path, levels)
    numbers = run_metrics.compute_run_metrics(run, dev.to_table(), test.to_table(), boxes, levels)
    text = json.loads(to_json(numbers), parse_constant=pytest.fail)
    assert text["test"]["auroc"]["estimate"] == pytest.approx(roc_auc_score(test.label, test.score))
    assert text["test"]["at_0.5"]["threshold"] == 0.5
    assert text["phantom"] is True and text["fingerprint"] == "fingerprint0"
    maps = text["localization"]["all_boxed"]["rules"]["half_max"]
    own = {"attention", "weights", "evidence", "grad_cam"}
    assert set(maps) - {f"random_weights_{name}" for name in own} == own | {
        "median_box",
        "image_centre",
        "random_map",
        "grid_box",
    }
    assert set(text["localization"]["all_boxed"]["rules"]) == {"half_max", "otsu", "wang", "phantom_tuned"}
    at_level = text["localization"]["all_boxed"]["rules"]["phantom_tuned"]
    assert set(at_level) == set(maps) and text["localization"]["levels"]["source"].startswith("dev hearts")
    assert maps["median_box"]["mean_iou"]["estimate"] == pytest.approx(1)  # all tiny boxes are one box
    assert text["thumbnail_baseline"]["auroc"]["estimate"] > 0.9
    lines = summary.format_summary(numbers)
    assert "CHEST PHANTOM" in lines and "thumbnail" in lines and "AUROC" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["localization_test.csv", "maps_test.npz"]


def test_levels_are_tuned_on_dev_boxes_of_phantoms_alone(run, predicted):
    dev = predicted["dev"]
    boxed = map_evaluation.find_boxed_images(run.dataset.splits["dev"])
    tuned = map_levels.tune_levels(run, dev, boxed)
    assert set(tuned) == set(dev.maps)
    patients, backbone = dev.index["patient"][boxed.rows], run.model.backbone
    overlap = [
        score_maps(
            dev.evidence[boxed.rows], boxed.boxes, patients, tiny.SIZE, backbone.stride, backbone.offset, level,
            scaling="positive",
        ).iou.mean()
        for level in map_levels.TUNED_LEVELS
    ]  # fmt: skip
    assert tuned["evidence"]["mean_iou"] == pytest.approx(max(overlap))
    xrays = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, name="chestxray14"))
    assert map_levels.tune_levels(xrays, dev, boxed) is None


def test_xrays_take_the_levels_of_a_phantom_run(run, tmp_path):
    phantoms = tmp_path / "phantoms"
    phantoms.mkdir()
    facts = {
        "phantom_tuned_levels": {"evidence": {"threshold": 0.35}},
        "config": dict(run_config(run)),
        "image_size": 64,
    }
    (phantoms / "metrics.json").write_text(json.dumps(facts))
    config = tiny.make_config(**{"eval.levels_run": str(phantoms)})
    xrays = dataclasses.replace(run, config=config, dataset=dataclasses.replace(run.dataset, name="chestxray14"))
    levels = map_levels.find_levels(xrays, None)
    assert levels.levels == {"evidence": 0.35} and "phantoms" in levels.source and "64 px" in levels.source
    (phantoms / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="eval.levels_run=.* is no tested run on chest phantoms"):
        map_levels.find_levels(xrays, None)
    assert map_levels.find_levels(dataclasses.replace(xrays, config=tiny.make_config()), None) is None


def run_config(run):
    return {f"model.{name}": run.config.model[name] for name in ("backbone", "pooling", "head")}


def test_examples_are_drawn_not_picked():
    predictions = make_predictions(7)
    rows = figures.choose_examples(predictions, 0.5, seed=1)
    called = predictions.score >= 0.5
    kinds = {(int(predictions.label[row]), bool(called[row])) for row in rows}
    assert kinds == {(1, True), (1, False), (0, True), (0, False)} and len(rows) == 8
    np.testing.assert_array_equal(rows, figures.choose_examples(predictions, 0.5, seed=1))
    assert set(rows) != set(figures.choose_examples(predictions, 0.5, seed=2))


def test_superimpose_is_image_plus_intensity_times_colour():
    image, heat = np.full((2, 2), 0.5), np.array([[0.0, 1.0], [0.5, 0.25]])
    shown = figures.superimpose(image, heat, 0.2)
    np.testing.assert_allclose(shown[0, 0], [0.5, 0.5, 0.5], atol=3e-3)  # no heat leaves the X-ray as it is
    np.testing.assert_allclose(shown[0, 1], [0.7, 0.7, 0.65], atol=3e-3)  # magma ends in a pale yellow
    np.testing.assert_allclose(figures.superimpose(image, heat, 0.0), np.repeat(image[..., None], 3, 2))
    assert figures.superimpose(np.ones((2, 2)), heat, 0.2).max() == 1


def test_pictures_are_written(run, predicted, tmp_path):
    rows = [
        {"epoch": i, "step": i, "learning_rate": 0.1, "train_loss": 1.0, "dev_loss": 1 / i, "dev_loss_weighted": 1.0,
         "dev_auroc": 0.5}
        for i in (1, 2)
    ]  # fmt: skip
    figures.save_augmentation_grid(run, tmp_path / "a.png")
    figures.save_curves(run, rows, tmp_path / "b.png")
    figures.save_attention_sheet(run, predicted["test"], 0.5, tmp_path / "c.png")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    for name in "abc":
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05
    assert len(list(tmp_path.iterdir())) == 4


def test_history_round_trip(tmp_path):
    write_history(tmp_path / "metrics.csv", [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-17}])
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,0.30000000000000004\n2,1e-17\n"
