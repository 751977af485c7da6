"""What a run leaves: evaluation rows, losses, the report against scikit-learn, pictures, another test size."""

import dataclasses
import json

import jax
import mass_twin
import matplotlib.image
import numpy as np
import pytest
import tiny
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import log_loss, roc_auc_score

from cxa_jax import figures, map_controls, map_evaluation, map_rules, outputs, ratio_metrics, run_metrics, summary
from cxa_jax import run as run_module
from cxa_jax.cardiothoracic import load_ratio_reader, read_edges
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions, compute_loss, evaluate_split
from cxa_jax.heat_maps import Rule, describe_rule, scale_map, upsample_maps
from cxa_jax.localization import score_maps
from cxa_jax.metric_writer import write_history
from cxa_jax.moments import fit_moments
from cxa_jax.ratio_fit import fit_on_phantoms
from cxa_jax.scored_maps import derive_maps
from cxa_jax.short_cuts import measure_short_cuts, predict_covered
from cxa_jax.steps import CONTROL
from cxa_jax.thumbnail import make_thumbnails
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


@pytest.fixture(scope="module")
def controls(run):
    return map_controls.draw_controls(run, run.create_state().variables)


@pytest.fixture(scope="module")
def boxed(run):
    return {name: map_evaluation.find_boxed_images(run.dataset.splits[name]) for name in ("dev", "test")}


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


def test_numbers_of_a_run(run, predicted, controls, boxed, tmp_path):
    dev, test = predicted["dev"], predicted["test"]
    of_dev = map_evaluation.collect_maps(run, dev, boxed["dev"], controls)
    rules = map_rules.find_rules(run, map_rules.tune_rules(run, of_dev, boxed["dev"]))
    boxes = outputs.save_localization(run, dev.to_table(), test, tmp_path, boxed["test"], rules, controls)
    numbers = run_metrics.compute_run_metrics(run, dev.to_table(), test.to_table(), boxes)
    text = json.loads(to_json(numbers), parse_constant=pytest.fail)
    assert text["test"]["auroc"]["estimate"] == pytest.approx(roc_auc_score(test.label, test.score))
    assert text["test"]["at_0.5"]["threshold"] == 0.5
    assert text["phantom"] is True and text["fingerprint"] == "fingerprint0"
    maps = text["localization"]["all_boxed"]["rules"]["half_max"]
    own = {"attention", "weights", "grad_cam", "evidence", "attended_evidence", "cam"}
    own |= {f"{name}_absolute" for name in ("evidence", "attended_evidence", "cam")}
    beside = {f"{control}_{name}" for control in ("random_weights", "mean_map", "shuffled") for name in own}
    shared = {"median_box", "image_centre", "random_map", "grid_box", "thumbnail"}
    assert set(maps) - beside == own | shared and beside <= set(maps)
    otsu = set(text["localization"]["all_boxed"]["rules"]["otsu"])
    assert not (beside | {"thumbnail"}) & otsu and own <= otsu  # controls only where they answer
    free = text["localization"]["threshold_free"]["maps"]
    answering = {f"{control}_attention" for control in ("random_weights", "mean_map", "shuffled")}
    assert set(free) == own | answering | {"random_map", "thumbnail"}
    assert all(0 <= value["estimate"] <= 1 for row in free.values() for value in row.values())
    assert free["attention"].keys() == {"max_box_acc_v2", *(f"max_box_acc_0.{n}" for n in (3, 5, 7)), "px_ap"}
    gains = maps["attention"]["iou_above_random_weights"]["estimate"]  # the network is as untrained as its control
    assert gains == pytest.approx(
        maps["attention"]["mean_iou"]["estimate"] - maps["random_weights_attention"]["mean_iou"]["estimate"]
    )
    images = np.stack([run.dataset.splits["test"].source[int(row)]["image"] for row in np.flatnonzero(test.label)])
    thumbnails = make_thumbnails(images, (2, 2))
    truth = np.tile([28.0, 20, 24, 24], (len(images), 1))
    geometry = (tiny.SIZE, run.model.backbone.stride, run.model.backbone.offset)
    seen = score_maps(thumbnails, truth, np.arange(len(images)), *geometry, "half_max")
    assert maps["thumbnail"]["mean_iou"]["estimate"] == pytest.approx(seen.iou.mean())
    for name in own:
        gain = maps[name]["mean_iou"]["estimate"] - seen.iou.mean()
        assert maps[name]["iou_above_thumbnail"]["estimate"] == pytest.approx(gain)
    assert set(text["localization"]["all_boxed"]["rules"]) == {"half_max", "otsu", "wang", "phantom_tuned"}
    at_level = text["localization"]["all_boxed"]["rules"]["phantom_tuned"]
    assert set(at_level) == set(maps) and text["localization"]["tuned_rules"]["source"].startswith("dev hearts")
    assert maps["median_box"]["mean_iou"]["estimate"] == pytest.approx(1)  # all tiny boxes are one box
    variables, programs = run.create_state().variables, run.test_step._cache_size()
    numbers["short_cuts"] = measure_short_cuts(run, variables, test, boxed["test"], boxes.table)
    assert run.test_step._cache_size() == programs  # the same step, the same batches
    cuts = json.loads(to_json(numbers["short_cuts"]), parse_constant=pytest.fail)
    assert cuts["attributes"] is None and cuts["heart_box"]["box"] == [28, 20, 24, 24]  # all are one view, sex and age
    greyed = predict_covered(run, variables, "test", np.arange(19), np.tile([28.0, 20, 24, 24], (19, 1)), inside=False)
    assert cuts["heart_box"]["heart_greyed"]["estimate"] == pytest.approx(roc_auc_score(test.label, greyed))
    assert {row["label"] for row in cuts["energy"]["median_box"]} == {"all", "negative", "positive"}
    lines = summary.format_summary(numbers)
    assert "heart greyed out: AUROC " in lines
    baseline = text["thumbnail_baseline"]
    assert baseline["auroc"]["estimate"] > 0.9
    gain = roc_auc_score(test.label, test.score) - baseline["auroc"]["estimate"]
    assert baseline["gain"]["estimate"] == pytest.approx(gain) and f"above it {gain:.3f} [" in lines
    assert "CHEST PHANTOM" in lines and "thumbnail" in lines and "AUROC" in lines
    cut = describe_rule(rules.rules["attention"])
    assert (
        f"boxes by phantom tuned rules (attention: {cut}):" in lines
        and "less its mean map of training images: mean IoU" in lines
    )
    assert lines.endswith("A map that does not beat these has shown nothing.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["localization_test.csv", "maps_test.npz"]


def test_the_ratio_is_measured_where_the_config_asks_for_it(run, predicted, controls, boxed, tmp_path, monkeypatch):
    """Heart widths of regression and maps are held to the true boxes'; nothing is joined where dev has other images."""
    dev, test = predicted["dev"].to_table(), predicted["test"].to_table()
    assert ratio_metrics.save_ratio(run, dev, test, tmp_path, boxed["test"], None) is None
    assert not list(tmp_path.iterdir())
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.cardiothoracic_ratio, config.data.num_workers = True, 1
    asked = dataclasses.replace(run, config=config)
    monkeypatch.setattr(ratio_metrics, "fit_on_phantoms", lambda workers: fit_on_phantoms(workers, 40, 10))
    found = outputs.save_localization(run, dev, predicted["test"], tmp_path, boxed["test"], None, controls)
    ratio = ratio_metrics.save_ratio(asked, dev, test, tmp_path, boxed["test"], found.table)
    text = json.loads(to_json(ratio), parse_constant=pytest.fail)
    reader = load_ratio_reader(tmp_path)
    assert text["reader"]["num_phantoms"] == 40 == reader.facts["num_phantoms"] and "drawings" in text["source"]
    images = [run.dataset.splits["test"].read_image(int(row)) for row in boxed["test"].rows]
    edges = read_edges(reader, images)
    widths = edges[:, 5] - edges[:, 4]
    bias = text["boxed"]["regression"]["heart_width"]["bias"]["estimate"]
    assert bias == pytest.approx(np.mean(widths - 24 / tiny.SIZE))
    thorax = edges[:, 1] - edges[:, 0]
    bias = text["boxed"]["regression"]["ratio"]["bias"]["estimate"]
    assert bias == pytest.approx(np.mean((widths - 24 / tiny.SIZE) / thorax))
    predicted_widths = found.table.scores["attention", "half_max"].predicted[:, 2] / tiny.SIZE
    measured = np.isfinite(predicted_widths)
    row = text["boxed"]["attention, half_max"]["heart_width"]
    assert row["num_images"] == measured.sum() and row["num_unmeasured"] == (~measured).sum()
    other = dataclasses.replace(dev, id=np.array([f"x{name}" for name in dev.id]))
    assert ratio_metrics.measure_ratio(asked, reader, other, test, boxed["test"], None)["coefficients"] is None
    assert text["coefficients"] is not None


def test_rules_are_tuned_on_dev_boxes_of_phantoms_alone(run, predicted, controls, boxed):
    dev, boxed = predicted["dev"], boxed["dev"]
    of_dev = map_evaluation.collect_maps(run, dev, boxed, controls)
    tuned = map_rules.tune_rules(run, of_dev, boxed)
    own = set(derive_maps(dev.maps))  # and controls are cut by what suits them
    beside = {f"{control}_{name}" for control in ("random_weights", "mean_map") for name in own}
    assert set(tuned) == own | beside | {"thumbnail"} and set(of_dev) - set(tuned) == {f"shuffled_{n}" for n in own}
    patients, backbone = dev.index["patient"][boxed.rows], run.model.backbone
    geometry = (tiny.SIZE, backbone.stride, backbone.offset)
    rules = [Rule(kind, value, components) for kind, value in map_rules.CUTS for components in ("largest", "all")]
    for name in ("evidence", "random_weights_evidence"):
        maps = of_dev[name]
        scaled = [scale_map(upsample_maps(cells, *geometry), "positive") for cells in maps]
        options = {"scaling": "positive"}
        overlap = [
            score_maps(maps, boxed.boxes, patients, *geometry, rule, **options).iou.mean()
            for rule in [*rules, *mass_twin.list_rules(scaled, boxed.boxes)]
        ]
        assert tuned[name]["mean_iou"] == pytest.approx(max(overlap))
        assert tuned[name]["num_images"] == len(boxed.rows) and tuned[name]["scaling"] == "positive"
    np.testing.assert_array_equal(of_dev["evidence"], dev.evidence[boxed.rows])
    xrays = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, name="chestxray14"))
    assert map_rules.tune_rules(xrays, of_dev, boxed) is None


def test_xrays_take_the_rules_of_a_phantom_run(run, tmp_path):
    phantoms = tmp_path / "phantoms"
    phantoms.mkdir()
    rule = Rule("percentile", 87.5, "all", "positive")
    mass = Rule("mass", 2.0, scaling="min_max", shares=(0.08, 0.91, 0.1, 0.87))
    both = {"evidence": rule, "thumbnail": mass}
    facts = {
        "phantom_tuned_rules": {
            name: each._asdict() | {"mean_iou": 0.4, "num_images": 200} for name, each in both.items()
        },
        "config": dict(run_config(run)),
        "image_size": 64,
    }
    (phantoms / "metrics.json").write_text(json.dumps(facts))
    config = tiny.make_config(**{"eval.levels_run": str(phantoms)})
    xrays = dataclasses.replace(run, config=config, dataset=dataclasses.replace(run.dataset, name="chestxray14"))
    rules = map_rules.find_rules(xrays, None)
    assert rules.rules == both and "phantoms" in rules.source and "64 px" in rules.source
    (phantoms / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="eval.levels_run=.* is no tested run on chest phantoms"):
        map_rules.find_rules(xrays, None)
    (phantoms / "metrics.json").write_text('{"phantom_tuned_levels": {"evidence": {"threshold": 0.35}}}')
    with pytest.raises(UserError, match="eval.levels_run=.* was tested by an older version.* --mode=evaluate"):
        map_rules.find_rules(xrays, None)
    assert map_rules.find_rules(dataclasses.replace(xrays, config=tiny.make_config()), None) is None


def test_the_mean_map_is_that_of_the_training_images(run, monkeypatch):
    monkeypatch.setattr(map_controls, "NUM_AVERAGED", 11)  # one batch and a part
    variables = run.create_state().variables
    means = map_controls.average_training_maps(run, variables)
    split = run.dataset.splits["train"]
    images = np.stack([split.source[row]["image"] for row in range(0, 44, 4)])
    outputs_of = [run.eval_step(variables, images[rows]) for rows in (np.arange(8), np.arange(3, 11))]
    maps = {name: np.concatenate([outputs_of[0][name], outputs_of[1][name][5:]]) for name in ("attention", "evidence")}
    np.testing.assert_allclose(means["attention"], maps["attention"].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(means["evidence_absolute"], np.abs(maps["evidence"]).mean(0), rtol=1e-3, atol=1e-6)
    product = (maps["attention"] * maps["evidence"]).mean(0)
    np.testing.assert_allclose(means["attended_evidence"], product, rtol=1e-3, atol=1e-6)
    nothing = dataclasses.replace(split, source=[])
    empty = dataclasses.replace(run.dataset, splits=run.dataset.splits | {"train": nothing})
    assert map_controls.average_training_maps(dataclasses.replace(run, dataset=empty), variables) is None


def test_random_weights_have_moments_of_training_images(run, controls, caplog):
    rows = np.array([0, 3, 5])
    drawn = run.draw_state(jax.random.fold_in(run.root_key, CONTROL)).variables
    recomputing = dataclasses.replace(run, config=tiny.make_config(**{"train.recompute_moments": 2}))
    nothing = dataclasses.replace(run.dataset.splits["train"], source=[])  # the data of another size may have none
    empty = dataclasses.replace(run.dataset, splits=run.dataset.splits | {"train": nothing})
    images = np.stack([run.dataset.splits["test"].source[int(row)]["image"] for row in rows])
    padded = np.concatenate([images, np.zeros((5, *images.shape[1:]), np.uint8)])
    evidence = []
    for variables, expected in (
        (controls.random_weights, fit_moments(run, drawn, 0, map_controls.NUM_FITTED)),
        (map_controls.draw_random_weights(recomputing), fit_moments(run, drawn, 0, 2)),  # as the run has them
        (map_controls.draw_random_weights(dataclasses.replace(recomputing, dataset=empty)), drawn),
    ):
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
        found = map_controls.predict_with_random_weights(run, variables, "test", rows)
        said = run.test_step(expected, padded)
        for name in ("attention", "evidence", "cam"):
            np.testing.assert_allclose(found[name], said[name][:3], rtol=1e-3, atol=1e-6)
        evidence.append(found["evidence"])
    assert "no training images for others" in caplog.text
    assert not np.allclose(evidence[0], evidence[2], rtol=0.1) and not np.array_equal(evidence[0], evidence[1])


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
    rule = Rule("percentile", 85, "all", "min_max")
    figures.save_attention_sheet(run, predicted["test"], 0.5, tmp_path / "c.png", rule)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    for name in "abc":
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05
    assert len(list(tmp_path.iterdir())) == 4


def test_boxes_lie_on_the_edges_of_their_pixels(run, predicted, tmp_path, monkeypatch):
    """imshow has pixel 0 from -.5 to .5."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(figures, "detect_boxes", lambda values, rule: np.array([[3.0, 4.0, 5.0, 6.0]]))
    figures.save_attention_sheet(run, predicted["test"], 0.5, tmp_path / "sheet.png")
    for axes in drawn[0].axes:
        boxes = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
        assert boxes in ([], [((27.5, 19.5), 24, 24), ((2.5, 3.5), 5, 6)])
    assert any(axes.patches for axes in drawn[0].axes)


def test_the_sheets_title_is_no_wider_than_the_sheet(run, predicted, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    wordy = Rule("mass", 0.5, scaling="min_max", shares=(0.12, 0.88, 0.12, 0.88))
    figures.save_attention_sheet(run, predicted["test"], 0.5, tmp_path / "c.png", wordy)
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    (title,) = [text for text in figure.texts if text.get_text() == figure.get_suptitle()]
    assert "the map's mass to the power 0.5" in title.get_text().replace("\n", " ")
    place = title.get_window_extent()
    assert 0 < place.x0 < place.x1 < figure.bbox.width
    assert place.y0 > max(axes.get_window_extent().y1 for axes in figure.axes)  # and hides no panel


def test_history_round_trip(tmp_path):
    write_history(tmp_path / "metrics.csv", [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-17}])
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,0.30000000000000004\n2,1e-17\n"
