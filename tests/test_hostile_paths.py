"""Names that want out: no file from elsewhere makes a run write outside its folder, or runs code."""

import csv
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import saved_run
from PIL import Image

from configs import common
from cxa_jax.data import image_folder
from cxa_jax.data.folder_table import read_rows
from cxa_jax.errors import UserError
from cxa_jax.export import export
from cxa_jax.models.torch_files import read_state_dict
from cxa_jax.outputs import evaluate
from cxa_jax.predict import predict
from cxa_jax.saved_maps import load_maps
from cxa_jax.workdir import open_workdir, refuse_outward_links

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Lauf mit Ümläuten") / "run"
    saved_run.save_run(folder)
    return folder


def list_outside(folder):
    return sorted(str(path) for path in folder.parent.rglob("*") if not path.is_relative_to(folder))


@pytest.mark.parametrize("link", ["log.txt", "predict", "checkpoints/best/0/params", "tensorboard", "a/b/c"])
def test_a_link_out_of_a_workdir_is_refused(tmp_path, workdir, link):
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(workdir, run)
    outside.mkdir()
    place = run / link
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside if "." not in link else outside / "precious.txt")
    uses = (
        lambda path: open_workdir(path).__enter__(),
        lambda path: predict(str(path), ["x.png"]),
        lambda path: export(str(path)),
        lambda path: evaluate(None, str(path)),
    )
    for use in uses:
        with pytest.raises(UserError, match=f"{link} is a link out of"):
            use(run)
    assert not list(outside.iterdir())


def test_links_that_stay_are_fine(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").symlink_to(tmp_path / "run")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    refuse_outward_links(tmp_path / "alias")


def test_odd_names_of_images(workdir, tmp_path):
    """Spaces, other scripts, quotes, bytes that are no text, a name as long as names may be, and a path upwards."""
    folder = tmp_path / "Röntgen 胸部"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    names = [
        "a b.png",
        "ü 胸 'x' \"y\".png",
        "n" * 251 + ".png",
        "é" * 125 + ".png",
        "=1+1.png",
        "line\nbreak.png",
        os.fsdecode(b"\xff\xfe.png"),
    ]
    for name in names:
        image.save(folder / name, "PNG")
    (folder / "list.csv").write_text('path\n"../Röntgen 胸部/a b.png"\n../../../../etc/passwd\n', encoding="utf-8")
    inputs = [str(folder / name) for name in names] + [str(folder / "list.csv")]
    output = tmp_path / "Ausgabe é"
    before = list_outside(output)
    with pytest.raises(UserError, match="1 of 9 inputs"):
        predict(str(workdir), inputs, str(output))
    assert list_outside(output) == before
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and [bool(row["error"]) for row in rows] == 8 * [False] + [True]
    assert len(list((output / "panels").iterdir())) == 8
    assert all((output / row["picture"]).is_file() and "/../" not in row["picture"] for row in rows[:8])


def test_ids_with_letters_that_cannot_be_printed_are_refused(tmp_path):
    config = common.get_config("x", "densenet121").data
    config.manual_dir, config.data_dir = str(tmp_path / "images"), str(tmp_path / "data")
    for name in ("cardiomegaly", "no_finding"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(9):
            Image.new("L", (8, 8)).save(tmp_path / "images" / name / f"{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "images" / "no_finding" / os.fsdecode(b"\xff.png"), "PNG")
    with pytest.raises(UserError, match="cannot be printed"):
        image_folder.prepare(config)
    assert not (tmp_path / "data").exists()


def test_a_table_may_name_files_above_its_folder_but_never_writes_there(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text("path,label\n../x.png,1\n")
    options = common.get_config("x", "densenet121").data.folder
    options.table = str(tmp_path / "t.csv")
    (row,) = read_rows(tmp_path / "images", options)
    assert row.id == "../x.png"  # a value in the records: files are numbered, never named after it


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_no_array_file_runs_code(tmp_path):
    mark = tmp_path / "ran"
    np.savez(tmp_path / "maps.npz", ids=np.array([Evil(mark)], object), geometry=np.zeros(3, int), images=np.zeros(1))
    with pytest.raises(UserError, match="maps.npz cannot be read"):
        load_maps(tmp_path / "maps.npz")
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps(Evil(mark)))
    with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Evil(mark)}))
        archive.writestr("../../climbing", "x")
    for name in ("legacy.pt", "new.pt"):
        with pytest.raises(UserError, match=name):
            read_state_dict(tmp_path / name)
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name == "climbing") == []


@pytest.mark.slow
def test_a_whole_run_in_paths_with_spaces_and_other_letters(tmp_path):
    """Through launch.py, from images to predictions: --workdir, data_dir, manual_dir, --inputs."""
    root = tmp_path / "Daten für 胸部 'X'"
    rng = np.random.default_rng(0)
    for name in ("cardiomegaly", "no_finding"):
        (root / "Bilder é" / name).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(root / "Bilder é" / name / f"Bild {i}.png")
    config = ["--config=configs/dense121.py", "--config.data.name=image_folder",
              f"--config.data.data_dir={root / 'fertig ü'}",
              f"--config.data.manual_dir={root / 'Bilder é'}", "--config.data.image_size=32",
              "--config.data.num_workers=1", "--config.train.num_epochs=1", "--config.eval.num_bootstrap=20",
              f"--workdir={root / 'Lauf 1'}"]  # fmt: skip
    outside = sorted(ROOT.iterdir())
    for words in (["--mode=prepare", *config], config,
                  ["--mode=predict", f"--workdir={root / 'Lauf 1'}", f"--inputs={root / 'Bilder é'}"]):  # fmt: skip
        command = [sys.executable, "launch.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len((root / "Lauf 1" / "predict" / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 49
    assert sorted(ROOT.iterdir()) == outside
