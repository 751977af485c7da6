import pathlib

import pytest
from nih_tree import BOXES, IMAGES, TASK_IMAGES, label_line, make_download, write_labels

from cxa_jax.data import nih_metadata
from cxa_jax.data.nih_download import Download, find_download
from cxa_jax.errors import UserError

REAL = pathlib.Path(__file__).parents[2] / "shared/data"
LABELS = "Data_Entry_2017_v2020.csv"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    make_download(tmp_path, size=8)
    return tmp_path


def _load(folder: pathlib.Path) -> nih_metadata.Metadata:
    return nih_metadata.load_metadata(find_download([folder]))


def _edit(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def real() -> Download:
    meta = REAL / "chestxray14_meta"
    if not meta.is_dir():
        pytest.skip("the real metadata are not here")
    lists = {"train_val": meta / "train_val_list.txt", "test": meta / "test_list.txt"}
    return Download(meta / LABELS, meta / "BBox_List_2017.csv", lists, {})


def test_real_metadata_give_the_published_counts(real):
    metadata = nih_metadata.load_metadata(real)
    assert metadata.version == "v2020"
    assert metadata.has_published_counts
    of = {(part, label): [row for row in metadata.rows if (row.part, row.label) == (part, label)]
          for part in ("train_val", "test") for label in (0, 1)}  # fmt: skip
    assert {key: len(rows) for key, rows in of.items()} == {
        ("train_val", 1): 1707, ("train_val", 0): 50_500, ("test", 1): 1069, ("test", 0): 9861,
    }  # fmt: skip
    assert len({row.patient for row in of["test", 1]}) == 338
    assert sum(row.findings == "Cardiomegaly" for row in of["test", 1]) == 316
    boxed = [row for row in metadata.rows if row.boxes]
    assert len(boxed) == 146
    assert len({row.patient for row in boxed}) == 128
    assert {row.part for row in boxed} == {"test"}
    assert all(0 <= x and 0 <= y and x + w <= 1024 and y + h <= 1024 for row in boxed for x, y, w, h in row.boxes)


def test_real_metadata_with_one_label_changed_are_refused(real, tmp_path):
    changed = tmp_path / LABELS
    changed.write_text(real.label_file.read_text().replace("00000001_000.png,Cardiomegaly,", "00000001_000.png,Mass,"))
    with pytest.raises(UserError, match=r"train_val_positives 1706 \(published: 1707\)"):
        nih_metadata.load_metadata(Download(changed, real.box_file, real.lists, {}))


@pytest.mark.parametrize("version", ["v2020", "2017"])
def test_both_label_files_give_the_same_rows(folder, version):
    before = _load(folder)
    (folder / LABELS).unlink()
    write_labels(folder, version)
    metadata = _load(folder)
    assert metadata.version == version
    assert metadata.rows == before.rows
    assert not metadata.has_published_counts
    row = metadata.rows[0]
    assert (row.id, row.patient, row.age, row.sex, row.view) == ("00000001_000.png", "1", 58, "F", "PA")


def test_rows_of_the_task(folder):
    metadata = _load(folder)
    assert [row.id for row in metadata.rows] == TASK_IMAGES
    assert {row.id: row.boxes for row in metadata.rows if row.boxes} == {name: (box,) for name, box in BOXES.items()}
    assert metadata.counts["train_val_positives"] == 4
    assert metadata.counts["train_val_negatives"] == 8
    assert metadata.counts["test_positives"] == 2
    assert metadata.counts["other_findings"] == 1


def test_images_with_only_other_findings_are_negatives_where_asked_for(folder):
    _edit(folder / LABELS, "Effusion|Mass,0,8,58", "Effusion|Mass,0,8,414")
    metadata = nih_metadata.load_metadata(find_download([folder]), other_findings=True)
    assert [row.age for row in metadata.rows if row.findings == "Effusion|Mass"] == [-1]
    labels = {row.id: row.label for row in metadata.rows}
    assert sorted(labels) == sorted(IMAGES)
    assert labels == {name: int("Cardiomegaly" in findings) for name, (findings, _, _) in IMAGES.items()}
    assert metadata.counts == _load(folder).counts  # of the paper's task, to be held against the published ones


def test_real_metadata_with_all_images(real):
    metadata = nih_metadata.load_metadata(real, other_findings=True)
    assert metadata.has_published_counts
    assert len(metadata.rows) == 112_120
    assert sum(row.label for row in metadata.rows) == 1707 + 1069


@pytest.mark.parametrize(
    ("findings", "label"),
    [("Cardiomegaly", 1), ("Effusion|Cardiomegaly", 1), ("No Finding", 0), ("Effusion", None), ("Mass|Hernia", None)],
)
def test_label_of(findings, label):
    assert nih_metadata.label_of(findings) == label


@pytest.mark.parametrize(
    ("text", "age"),
    [("58", 58), ("058Y", 58), ("006M", 0), ("030M", 2), ("012D", 0), ("414Y", -1), ("148", -1), ("", -1), ("?", -1)],
)
def test_ages(folder, text, age):
    _edit(folder / LABELS, label_line("00000005_000.png", "Cardiomegaly", 5),
          label_line("00000005_000.png", "Cardiomegaly", 5, text))  # fmt: skip
    metadata = _load(folder)
    assert {row.id: row.age for row in metadata.rows}["00000005_000.png"] == age
    assert metadata.counts["unknown_ages"] == (age < 0)


def test_unlisted_images_are_left_out_and_counted(folder):
    _edit(folder / "test_list.txt", "00000011_000.png\n", "")
    metadata = _load(folder)
    assert "00000011_000.png" not in {row.id for row in metadata.rows}
    assert metadata.counts["unlisted"] == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (LABELS, "Finding Labels", "Labels", "lacks the columns Finding Labels"),
        (LABELS, "Patient ID,Patient Age", "ID,Age", "lacks the columns Patient ID, Patient Age"),
        (LABELS, "00000002_000.png", "00000002_001.png", "line 5: 00000002_001.png is there twice"),
        (LABELS, "Effusion|Mass", "Effusion|Masse", "unknown finding Masse"),
        (LABELS, ",0,8,58,F,PA,2500,2048,0.168,0.168", ",0", "too few"),
        (LABELS, ",0,8,58", ",0,p8,58", "'p8' is not a number"),
        ("test_list.txt", "00000010_000.png", "00000012_000.png", "1 of 4 images are not in .*00000012_000"),
        ("test_list.txt", "00000010_000.png", "00000009_000.png", "there twice: 00000009_000"),
        ("test_list.txt", "00000010_000.png", "00000001_000.png", "^1 images are on both lists .*00000001_000"),
        (LABELS, "00000010_000.png,No Finding,0,10,", "00000010_000.png,No Finding,0,3,", "^1 patients .* both .*: 3$"),
        ("BBox_List_2017.csv", "00000009_000.png", "00000019_000.png", "1 boxed images are not in .*00000019_000"),
        ("BBox_List_2017.csv", "128.0,64.0", "128.0,x", "line 3: not a box"),
        ("BBox_List_2017.csv", "128.0,64.0", "128.0", "line 3: not a box"),
        ("BBox_List_2017.csv", "128.0,64.0", "-128.0,64.0", "line 3: not a box"),
    ],
)
def test_wrong_metadata_are_named(folder, file, old, new, message):
    _edit(folder / file, old, new)
    with pytest.raises(UserError, match=message) as error:
        _load(folder)
    assert "_list" in str(error.value) or file in str(error.value)


def test_a_label_file_that_is_no_text_is_named(folder):
    (folder / LABELS).write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(UserError, match="not a CSV file"):
        _load(folder)
