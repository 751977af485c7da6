"""Reading and writing predictions: exact round trip, every kind of bad file named with its line."""

import pathlib

import numpy as np
import pytest

from cxa_jax.errors import UserError
from cxa_jax.predictions import read_predictions, write_predictions


def _columns(num_images: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    logits = rng.normal(-3, 4, num_images)
    return {
        "ids": np.array([f"{index:08d}_000.png" for index in range(num_images)]),
        "patients": np.array([f"{index // 2}" for index in range(num_images)]),
        "labels": rng.integers(0, 2, num_images).astype(np.int32),
        "logits": logits,
        "scores": 1 / (1 + np.exp(-logits)),
    }


def test_what_is_written_is_read_back_exactly(tmp_path: pathlib.Path):
    columns = _columns()
    path = tmp_path / "predictions.csv"
    write_predictions(path, **columns)
    table = read_predictions(path)
    assert path.read_text().splitlines()[0] == "id,patient,label,logit,score"
    assert len(table) == 20
    for name, values in columns.items():
        assert np.array_equal(getattr(table, name.removesuffix("s")), values), name
    assert [item.name for item in tmp_path.iterdir()] == ["predictions.csv"]


def test_a_logit_that_is_not_the_scores_is_refused_by_its_line(tmp_path: pathlib.Path):
    path = tmp_path / "theirs.csv"
    path.write_text("id,label,score,logit\na,0,0.5,0\nb,1,0.9,2.1972\nc,1,0.9,-4.5\n")
    with pytest.raises(UserError, match=r"line 4: logit -4\.5 means a score of 0\.0110, and the score is 0\.9"):
        read_predictions(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: pathlib.Path):
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    with pytest.raises(UserError, match="differ in length"):
        write_predictions(path, **_columns() | {"scores": np.zeros(3)})
    with pytest.raises(TypeError):
        write_predictions(path, **_columns(1) | {"logits": [None]})
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write"):
        write_predictions(tmp_path / "missing" / "p.csv", **_columns())


def test_columns_may_come_in_any_order_with_others_between(tmp_path: pathlib.Path):
    path = tmp_path / "foreign.csv"
    path.write_text("\ufeffScore, note ,ID,label\r\n0.25,x,a.png,1.0\r\n\r\n1,y,b.png,0\r\n", encoding="utf-8")
    table = read_predictions(path)
    assert table.id.tolist() == ["a.png", "b.png"] and table.label.tolist() == [1, 0]
    assert table.score.tolist() == [0.25, 1.0] and table.patient is None and table.logit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks the column\(s\) id, label, score"),
        ("id,label\na,1\n", r"lacks the column\(s\) score; its first line reads id,label"),
        ("id,label,score,id\na,1,0.5,b\n", "id more than once"),
        ("id,label,score\n", "no rows"),
        ("id,label,score\na,1,0.5\nb,1\n", "line 3: 2 cells where the header has 3"),
        ("id,label,score\na,1,0.5\nb,0,0.5\na,1,0.5\n", "line 4: id a is already on line 2"),
        ("id,label,score\n,1,0.5\n", "line 2: the id is empty"),
        ("id,label,score\na,2,0.5\n", "line 2: label is '2', needed is 0 or 1"),
        ("id,label,score\na,1,1.5\n", r"line 2: score is '1.5', needed is a number in \[0, 1\]"),
        ("id,label,score\na,1,nan\n", "line 2: score is 'nan'"),
        ("id,label,score\na,1,high\n", "line 2: score is 'high'"),
        ("id,label,score,logit\na,1,0.5,inf\n", "line 2: logit is 'inf'"),
        ("id,label,score,patient\na,1,0.5, \n", "line 2: the patient is empty"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: pathlib.Path, text: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path)
    assert "bad.csv" in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="cannot read predictions .*none.csv"):
        read_predictions(tmp_path / "none.csv")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not a CSV text file"):
        read_predictions(tmp_path / "image.png")
