"""One's own images as rows: what folders and tables mean, and what neither may say."""

import pathlib

import pytest
from PIL import Image

from configs import common
from cxa_jax.data.folder_table import read_rows
from cxa_jax.errors import UserError


def options(**fields):
    config = common.get_config("x", "densenet121").data.folder
    for name, value in fields.items():
        config[name] = value
    return config


def make(root, *names):
    for name in names:
        path = pathlib.Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(path, format="PNG")
    return root


def test_folders_named_by_class(tmp_path):
    make(tmp_path, "Cardiomegaly/p1_a.png", "no finding/sub/p2_a.png", "no finding/.hidden.png")
    rows = read_rows(tmp_path, options(patient_regex=r"p(\d+)_"))
    assert [(row.id, row.label, row.patient, row.split) for row in rows] == [
        ("Cardiomegaly/p1_a.png", 1, "1", ""),
        ("no finding/sub/p2_a.png", 0, "2", ""),
    ]


def test_folders_named_by_split(tmp_path):
    make(tmp_path, "train/normal/a.png", "train/big/b.png", "val/big/c.png", "test/normal/d.png")
    rows = read_rows(tmp_path, options(positive="big", negative="Normal"))
    assert {row.id: (row.split, row.label) for row in rows} == {
        "train/normal/a.png": ("train", 0),
        "train/big/b.png": ("train", 1),
        "val/big/c.png": ("dev", 1),
        "test/normal/d.png": ("test", 0),
    }
    assert [row.patient for row in rows] == [row.id for row in rows]  # unknown: each its own


def test_a_table(tmp_path):
    make(tmp_path, "a.png", "x/b.png")
    (tmp_path / "t.csv").write_text(
        "Path, Label,patient,split,boxes,age,view,sex\na.png,Cardiomegaly,p1,train,1 2 3 4; 0 0 8 6,61,PA,F\n"
        "x/b.png,0,p2,Validation,,,,\n"
    )
    first, second = read_rows(tmp_path, options(table=str(tmp_path / "t.csv")))
    assert first.label == 1 and first.boxes == ((1, 2, 3, 4), (0, 0, 8, 6)) and (first.age, first.view) == (61, "PA")
    assert (second.id, second.label, second.patient, second.split) == ("x/b.png", 0, "p2", "dev")
    assert second.boxes == () and second.age == -1


def test_a_table_names_the_patients_of_folders(tmp_path):
    make(tmp_path, "train/cardiomegaly/a.png", "test/no_finding/b.png")
    (tmp_path / "t.csv").write_text("path,patient\ntrain/cardiomegaly/a.png,p1\ntest/no_finding/b.png,p2\n")
    rows = read_rows(tmp_path, options(table=str(tmp_path / "t.csv")))
    assert [(row.label, row.split, row.patient) for row in rows] == [(0, "test", "p2"), (1, "train", "p1")]
    make(tmp_path, "train/cardiomegaly/c.png", "other.txt")
    with pytest.raises(UserError, match="1 images below .* are not in .*t.csv, the first is train/cardiomegaly/c.png"):
        read_rows(tmp_path, options(table=str(tmp_path / "t.csv")))
    (tmp_path / "t.csv").write_text("path,patient\nother.txt,p1\n")
    with pytest.raises(UserError, match="line 2: .*other.txt lies in no class folder"):
        read_rows(tmp_path, options(table=str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,labels\na.png,1\n", "lacks the column label, and the folders do not say it: .*a.png lies in no class"),
        ("file,label\na.png,1\n", "lacks the column path"),
        ("path,label\n,1\n", "line 2: there is no file"),
        ("path,label\na.png,2\n", "line 2: label '2'"),
        ("path,label\nb.png,1\n", "line 2: there is no file"),
        ("path,label\na.png,1\na.png,0\n", "line 3: a.png is already on line 2"),
        ("path,label,split\na.png,1,holdout\n", "line 2: split 'holdout'"),
        ("path,label,boxes\na.png,1,1 2 3\n", "line 2: box '1 2 3'"),
        ("path,label,boxes\na.png,1,1 2 0 3\n", "line 2: box '1 2 0 3'"),
        ("path,label,age\na.png,1,old\n", "line 2: "),
        ("path,label\n", "no images"),
    ],
)
def test_tables_that_mean_nothing(tmp_path, text, message):
    make(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path, options(table=str(tmp_path / "t.csv")))


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (["cardiomegaly/a.png", "oedema/b.png"], {}, "oedema is named neither like a class"),
        (["train/cardiomegaly/a.png", "test/x/b.png"], {}, "x is named neither"),
        (["cardiomegaly/a.png", "b.png"], {}, "lies in no class folder"),
        (["cardiomegaly/a.png"], {"patient_regex": "("}, "patient_regex"),
        (["cardiomegaly/p1.png", "cardiomegaly/a.png"], {"patient_regex": r"p\d"}, "have no patient, the first is"),
        (["cardiomegaly/a.png"], {"negative": "Cardiomegaly"}, "both 'cardiomegaly'"),
    ],
)
def test_folders_that_mean_nothing(tmp_path, names, fields, message):
    with pytest.raises(UserError, match=message):
        read_rows(make(tmp_path, *names), options(**fields))


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="manual_dir"):
        read_rows(tmp_path / "nothing", options())
