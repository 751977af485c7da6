"""Foreign images by a finished run: the scores of evaluation, every file a row, nothing hidden, nothing overwritten."""

import csv
import json
import shutil
import types

import numpy as np
import pytest
import saved_run
import test_dicom
from PIL import Image
from scipy.special import expit

from cxa_jax.cardiothoracic import compute_ratios, fit_ratio_reader, read_edges, save_ratio_reader
from cxa_jax.errors import UserError
from cxa_jax.evaluate import evaluate_split
from cxa_jax.export import export
from cxa_jax.heat_maps import Rule, detect_boxes, scale_map, upsample_maps
from cxa_jax.predict import COLUMNS, locate, predict
from cxa_jax.ratio_fit import draw_chests
from cxa_jax.trained_network import load_trained_network, read_run_config
from cxa_jax.weights import load_weights


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run, variables = saved_run.save_run(folder)
    split = run.dataset.splits["test"]
    (folder / "png").mkdir()
    for row in range(len(split.source)):
        Image.fromarray(split.read_image(row)[..., 0]).save(folder / "png" / f"{split.index['id'][row]}.png")
    evaluated = evaluate_split(run.eval_step, variables, split, run.mesh, batch_size=8, num_threads=0)
    return folder, evaluated


@pytest.fixture(scope="module")
def rows(workdir):
    folder, _ = workdir
    (folder / "png" / "zz_broken.png").write_bytes((folder / "png" / "test000.png").read_bytes()[:200])
    with pytest.raises(UserError, match="2 of 21 inputs could not be read"):
        predict(str(folder), [str(folder / "png"), str(folder / "nothing.png")])
    with (folder / "predict" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_prepared_pngs_score_as_in_evaluation(workdir, rows):
    folder, evaluated = workdir
    assert [row["path"] for row in rows[:19]] == [f"{folder}/png/{name}.png" for name in evaluated.index["id"]]
    np.testing.assert_allclose([float(row["logit"]) for row in rows[:19]], evaluated.logit, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose([float(row["score"]) for row in rows[:19]], evaluated.score, rtol=1e-6)


def test_rows_say_what_was_decided_and_why(rows):
    assert tuple(rows[0]) == COLUMNS
    for row in rows[:19]:
        score, logit = float(row["score"]), float(row["logit"])
        calibrated = expit(saved_run.PLATT["scale"] * logit + saved_run.PLATT["bias"])
        assert float(row["calibrated_score"]) == pytest.approx(calibrated)
        assert float(row["threshold"]) == saved_run.THRESHOLD and "dev" in row["threshold_origin"]
        assert row["decision"] == ("cardiomegaly" if score >= saved_run.THRESHOLD else "no finding")
        assert bool(row["box_x"]) == (row["decision"] == "cardiomegaly")
        assert row["error"] == ""


def test_a_bad_file_is_a_row(rows):
    assert [bool(row["error"]) for row in rows] == 19 * [False] + [True, True]
    assert "cannot be read as an image" in rows[19]["error"] and "No such file" in rows[20]["error"]
    assert all(rows[19][name] == "" for name in COLUMNS if name not in ("path", "error"))


def test_pictures_and_summary(workdir, rows):
    folder = workdir[0] / "predict"
    pictures = sorted(path.name for path in (folder / "panels").iterdir())
    assert [f"panels/{name}" for name in pictures] == [row["picture"] for row in rows[:19]]
    picture = np.asarray(Image.open(folder / rows[0]["picture"]))
    assert picture.shape[1] > 3 * 400 and picture.std() > 20
    assert [path.name for path in folder.glob("sheet_*.png")] == ["sheet_001.png"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["counts"]["errors"] == 2 and summary["counts"]["predicted"] == 19
    assert summary["box"].startswith("attention W, 0-1: half the maximum, largest component; px of the file")
    assert "not a medical device" in summary["remark"] and "drawings" in summary["remark"]
    assert not list(folder.parent.glob("*.partial"))


TUNED = {"kind": "mass", "value": 2.0, "components": "largest", "scaling": "logit", "shares": [0.3, 0.7, 0.4, 0.8]}


def tune(folder, **fields):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["localization"] = {"tuned_rules": {"rules": {"attention": TUNED | fields}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_the_box_is_read_by_the_rule_that_phantoms_tuned(tmp_path):
    """Also out of a weights file; the fixed levels of `locate` are those of runs without one."""
    saved_run.save_run(tmp_path / "run")
    tune(tmp_path / "run")
    attention = np.random.default_rng(11).uniform(0.05, 0.95, (2, 2)).astype(np.float32)
    out = {"attention": attention, "evidence": attention}
    network = load_trained_network(str(tmp_path / "run"))
    backbone = network.model.backbone
    values = scale_map(upsample_maps(attention, network.image_size, backbone.stride, backbone.offset), "logit")
    wanted = detect_boxes(values, Rule(**TUNED | {"shares": tuple(TUNED["shares"])}))[0]
    export(str(tmp_path / "run"), str(tmp_path / "file.safetensors"))
    for found in (network, load_weights(str(tmp_path / "file.safetensors"))):
        np.testing.assert_allclose(locate(found, out)[1], wanted, rtol=1e-6)
    tune(tmp_path / "run", shares=[0.7, 0.3, 0.4, 0.8])
    with pytest.raises(UserError, match="metrics.json is damaged"):
        load_trained_network(str(tmp_path / "run"))


def test_predictions_are_not_overwritten(workdir, rows):
    with pytest.raises(UserError, match="--output"):
        predict(str(workdir[0]), [str(workdir[0] / "png")])


def test_a_cut_run_leaves_no_folder_and_the_next_one_is_whole(workdir, tmp_path, monkeypatch):
    """Also names that are long, or no text, or the same in two folders."""
    source = next((workdir[0] / "png").glob("test*.png")).read_bytes()
    for name in ("a/" + 251 * "x", "a/same", "b/same", "b/ü心", "b/no\udcfftext"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(source)
    inputs, output = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out"
    output.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("cxa_jax.predict.draw_panels", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(str(workdir[0]), inputs, str(output))
    assert not list(output.iterdir()) and (tmp_path / "out.partial" / "predictions.csv").is_file()
    (tmp_path / "out.partial" / "panels" / "stale.png").write_bytes(b"")
    predict(str(workdir[0]), inputs, str(output))
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len({row["picture"] for row in written}) == 5 == len(list((output / "panels").iterdir()))
    assert all((output / row["picture"]).is_file() for row in written) and not (tmp_path / "out.partial").exists()
    assert len({row["logit"] for row in written}) == 1
    assert {row["path"] for row in written} >= {f"{tmp_path}/b/ü心.png", f"{tmp_path}/b/no\\udcfftext.png"}


def test_folders_of_others_are_left_alone(workdir, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(UserError, match="out.partial is in the way"):
        predict(str(workdir[0]), [str(workdir[0] / "png")], str(tmp_path / "out"))
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        predict(str(workdir[0]), [str(workdir[0] / "png")], str(tmp_path))


def test_box_is_in_pixels_of_the_file_and_no_patient_is_named(workdir, tmp_path, rows):
    """The same picture at three times the width and twice the height has its box there."""
    folder, evaluated = workdir
    positive = int(np.argmax(evaluated.score))
    assert evaluated.score[positive] >= saved_run.THRESHOLD, "the tiny network calls nothing positive"
    image = Image.open(rows[positive]["path"])
    image.resize((192, 128), Image.Resampling.NEAREST).save(tmp_path / "big.png")
    # antialiasing gives a little other pixels, so the box may move by what the map's slope makes of that
    test_dicom.write(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=4000)
    predict(str(folder), [str(tmp_path / "big.png"), str(tmp_path / "a.dcm")], str(tmp_path / "out"))
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"a.dcm" in written and test_dicom.SECRET.encode() not in written
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        big = next(csv.DictReader(file))
    for axis, factor in (("x", 3), ("w", 3), ("y", 2), ("h", 2)):
        assert float(big[f"box_{axis}"]) == pytest.approx(factor * float(rows[positive][f"box_{axis}"]), abs=4 * factor)


def test_the_ratio_stands_beside_the_score_where_the_run_has_a_reader(workdir, tmp_path, rows):
    """In px of the file; an image of one grey level has none, and a warning."""
    assert all(row[name] == "" for row in rows for name in ("cardiothoracic_ratio", "heart_width", "thorax_width"))
    folder = tmp_path / "run"
    shutil.copytree(workdir[0], folder, ignore=shutil.ignore_patterns("png", "predict"))
    images, edges = draw_chests("natural", 7, range(30), True, 1)
    reader = fit_ratio_reader(images[:24], edges[:24])
    save_ratio_reader(reader, folder)
    for number, chest in enumerate(images[24:]):
        Image.fromarray(chest[..., 0]).save(tmp_path / f"chest{number}.png")
    Image.fromarray(images[24, ..., 0]).resize((192, 128), Image.Resampling.NEAREST).save(tmp_path / "wide.png")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(tmp_path / "x_blank.png")
    predict(str(folder), [str(tmp_path / "*.png")], str(tmp_path / "out"))
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    found = read_edges(reader, images[24:])
    for row, ratio, own in zip(table[:6], compute_ratios(found), found, strict=True):
        assert float(row["cardiothoracic_ratio"]) == pytest.approx(ratio, abs=6e-4)
        assert float(row["heart_width"]) == pytest.approx(64 * (own[5] - own[4]), abs=0.06)
    wide, blank = table[6:]
    assert float(wide["thorax_width"]) == pytest.approx(3 * float(table[0]["thorax_width"]), abs=6)
    assert blank["cardiothoracic_ratio"] == "" and "ratio: no edges found" in blank["warnings"]
    assert "fitted on drawings" in json.loads((tmp_path / "out" / "summary.json").read_text())["cardiothoracic_ratio"]
    assert json.loads((workdir[0] / "predict" / "summary.json").read_text())["cardiothoracic_ratio"] is None


def test_map_of_a_network_without_attention():
    backbone = types.SimpleNamespace(stride=32, offset=14)
    model = types.SimpleNamespace(backbone=backbone)
    network = types.SimpleNamespace(has_attention=False, image_size=64, model=model, box_rule=Rule("half_max"))
    evidence = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    heat, box = locate(network, {"attention": np.full((2, 2), 0.5, np.float32), "evidence": evidence})
    assert heat.shape == (64, 64) and heat.min() >= 0 and heat.max() == 1 and box is not None


def test_older_config_takes_defaults_and_foreign_fields_are_named(workdir, tmp_path):
    stored = json.loads((workdir[0] / "config.json").read_text())
    del stored["init"], stored["eval"]["overlay_intensity"]
    for field in ("stride", "stride_by", "batch_norm_momentum", "attention_bound"):
        del stored["model"][field]
    stored["train"]["from_the_future"] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = read_run_config(tmp_path)
    assert config.eval.overlay_intensity == 0.2
    model = config.model
    assert (model.stride, model.stride_by, model.batch_norm_momentum, model.attention_bound) == (32, "cut", 0.99, 0.0)
    stored["model"]["from_the_future"] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="model.from_the_future"):
        read_run_config(tmp_path)


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no trained run"):
        load_trained_network(str(tmp_path))
