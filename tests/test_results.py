"""Reading finished runs: what is there comes back, what is missing, mixed or doubled is named."""

import json
import pathlib

import numpy as np
import pytest
from finished_runs import write_run

from cxa_jax.errors import UserError
from cxa_jax.predictions import read_predictions
from cxa_jax.results import load_results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_run(tmp_path_factory.mktemp("runs") / "cxa")


def write_csv(path: pathlib.Path, rows: list[tuple[str, int, float]]) -> str:
    path.write_text("id,label,score\n" + "".join(f"{i},{label},{score}\n" for i, label, score in rows))
    return str(path)


def copy_run(run: pathlib.Path, folder: pathlib.Path, **changes) -> str:
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    metrics = json.loads((run / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    return str(folder)


def test_a_run_comes_back_whole(run: pathlib.Path):
    (result,) = load_results([str(run)])
    assert result.name == "cxa" and result.is_phantom and result.config["model.pooling"] == "amm"
    assert len(result.test) == 60 and len(result.dev) == 40 and len(result.history) == 3
    assert set(result.maps.maps) == {"attention", "weights", "evidence", "cam", "grad_cam"}
    assert result.boxes.ids.tolist() == result.test.id[result.test.label == 1].tolist()


def test_a_foreign_file_takes_the_runs_order_and_patients(run: pathlib.Path, tmp_path: pathlib.Path):
    table = read_predictions(run / "predictions_test.csv")
    pairs = zip(table.id, table.label, strict=True)
    rows = [(image_id, label, round(0.01 * n, 2)) for n, (image_id, label) in enumerate(pairs)]
    foreign = write_csv(tmp_path / "theirs.csv", rows[::-1])
    for paths in ([str(run), foreign], [foreign, str(run)]):
        by_name = {result.name: result.test for result in load_results(paths)}
        assert np.array_equal(by_name["theirs"].id, by_name["cxa"].id)
        assert by_name["theirs"].score.tolist() == [score for _, _, score in rows]
        assert np.array_equal(by_name["theirs"].patient, table.patient)


def test_other_images_or_labels_are_refused(run: pathlib.Path, tmp_path: pathlib.Path):
    table = read_predictions(run / "predictions_test.csv")
    rows = [(image_id, label, 0.5) for image_id, label in zip(table.id, table.label, strict=True)]
    with pytest.raises(
        UserError, match="other images: 60 and 59, of which 1 are in one alone, such as phantom_test000"
    ):
        load_results([str(run), write_csv(tmp_path / "fewer.csv", rows[1:])])
    rows[3] = (rows[3][0], 1 - rows[3][1], 0.5)
    with pytest.raises(UserError, match=f"disagree on the label of {rows[3][0]}"):
        load_results([str(run), write_csv(tmp_path / "flipped.csv", rows)])


def test_a_file_finds_its_dev_beside_it(run: pathlib.Path):
    (result,) = load_results([str(run / "predictions_test.csv")])
    assert result.metrics is None and result.dev_name == "predictions_dev.csv" and len(result.dev) == 40


def test_a_dev_file_with_test_images_is_refused(tmp_path: pathlib.Path):
    test = write_csv(tmp_path / "their_test.csv", [("a", 0, 0.2), ("b", 1, 0.7)])
    write_csv(tmp_path / "their_dev.csv", [("b", 1, 0.7), ("c", 0, 0.1)])
    with pytest.raises(UserError, match="share 1 images, such as b"):
        load_results([test])


def test_a_run_on_a_part_of_the_images_brings_all_to_that_part(run: pathlib.Path, tmp_path: pathlib.Path):
    table = read_predictions(run / "predictions_test.csv")
    kept = table.id[10:40]
    part = pathlib.Path(copy_run(run, tmp_path / "eval_1024"))
    lines = (run / "predictions_test.csv").read_text().splitlines()
    chosen = [line for line in lines[1:] if line.split(",")[0] in kept]
    (part / "predictions_test.csv").write_text("\n".join([lines[0], *chosen[::-1]]) + "\n")
    (part / "predictions_dev.csv").unlink()
    (tmp_path / "predictions_dev.csv").write_text((run / "predictions_dev.csv").read_text())
    results = load_results([str(run), str(part)])
    for result in results:
        assert sorted(result.test.id) == sorted(kept) and np.array_equal(result.test.score, results[0].test.score)
        assert set(result.boxes.ids) == set(kept[result.test.label[np.argsort(result.test.id)] == 1])
    assert [result.dev_name for result in results] == ["dev", "dev at 64 px"]
    with pytest.raises(UserError, match="make one report for each"):  # a file that lacks images is a mistake
        load_results([str(run), write_csv(tmp_path / "few.csv", [(i, 0, 0.5) for i in kept])])


def test_phantoms_and_patients_are_not_mixed(run: pathlib.Path, tmp_path: pathlib.Path):
    real = copy_run(run, tmp_path / "real", phantom=False, data="chestxray14")
    with pytest.raises(UserError, match=r"mixes chest phantoms \(cxa\) with X-rays of patients \(real\)"):
        load_results([str(run), real])


def test_what_is_missing_is_named_with_the_cure(run: pathlib.Path, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="--workdirs is empty"):
        load_results([])
    with pytest.raises(UserError, match="there is no .*nowhere"):
        load_results([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="has no metrics.json: .*--mode=evaluate"):
        load_results([str(tmp_path)])
    with pytest.raises(UserError, match="more than once"):
        load_results([str(run), str(run)])
    old = pathlib.Path(copy_run(run, tmp_path / "old", test={}))
    with pytest.raises(UserError, match="older version"):
        load_results([str(old)])
    broken = pathlib.Path(copy_run(run, tmp_path / "broken"))
    (broken / "maps_test.npz").write_bytes(b"PK half")
    with pytest.raises(UserError, match="maps_test.npz cannot be read"):
        load_results([str(broken)])
    (broken / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        load_results([str(broken)])
