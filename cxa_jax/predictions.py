"""Predictions as a CSV file: one row for each image, with its patient, label, logit and score."""

import csv
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from scipy.special import expit

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.errors import UserError

COLUMNS = ("id", "patient", "label", "logit", "score")
REQUIRED_COLUMNS = ("id", "label", "score")
ATTRIBUTES = ("view", "sex", "age", "findings")  # optional: what strata are made of


@dataclass(frozen=True)
class PredictionTable:
    """Columns of a predictions file, row by row.

    Attributes:
        id: str [N], unique.
        label: int32 [N], 0 or 1.
        score: float64 [N], probability of cardiomegaly.
        patient: str [N], or None where the file does not say: intervals then take every image for a patient.
        logit: float64 [N], score before the sigmoid, or None.
        attributes: text [N] for each of ATTRIBUTES that the file has; cells may be empty.
    """

    id: np.ndarray
    label: np.ndarray
    score: np.ndarray
    patient: np.ndarray | None = None
    logit: np.ndarray | None = None
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: np.ndarray) -> Self:
        """Return the given rows, in their order."""
        columns = {name: getattr(self, name) for name in ("id", "label", "score", "patient", "logit")}
        taken = {name: None if column is None else column[rows] for name, column in columns.items()}
        return type(self)(**taken, attributes={name: column[rows] for name, column in self.attributes.items()})


def read_predictions(path: str | os.PathLike) -> PredictionTable:
    """Read a CSV with the columns id, label, score and optionally patient, logit, view, sex, age, findings.

    Columns may come in any order; others are ignored.

    Raises:
        UserError: no such file, not text, a missing or doubled column, no rows, a row of another length, an empty or
            doubled id, a label other than 0 or 1, a score outside [0, 1], a logit that is not finite or not
            the score's. The message names the file and the line.
    """
    lines, rows = _read_rows(pathlib.Path(path))
    ids = [_text(path, line, "id", row) for line, row in zip(lines, rows, strict=True)]
    _refuse_duplicates(path, lines, ids)
    labels = [_number(path, line, "label", row, "0 or 1") for line, row in zip(lines, rows, strict=True)]
    scores = [_number(path, line, "score", row, "a number in [0, 1]") for line, row in zip(lines, rows, strict=True)]
    table = PredictionTable(id=np.array(ids), label=np.array(labels, np.int32), score=np.array(scores))
    patient, logit = None, None
    if "patient" in rows[0]:
        patient = np.array([_text(path, line, "patient", row) for line, row in zip(lines, rows, strict=True)])
    if "logit" in rows[0]:
        logit = [_number(path, line, "logit", row, "a finite number") for line, row in zip(lines, rows, strict=True)]
        logit = np.array(logit)
        _refuse_other_logits(path, lines, logit, table.score)
    attributes = {name: np.array([row[name] for row in rows]) for name in ATTRIBUTES if name in rows[0]}
    return PredictionTable(table.id, table.label, table.score, patient, logit, attributes)


def _refuse_other_logits(path: str | os.PathLike, lines: list[int], logits: np.ndarray, scores: np.ndarray) -> None:
    """Calibration reads the logit, all else the score: they must say the same."""
    apart = np.abs(expit(logits) - scores) > 1e-3
    if apart.any():
        row = int(np.argmax(apart))
        raise UserError(
            f"{path}, line {lines[row]}: logit {logits[row]:g} means a score of {expit(logits[row]):.4f}, and the "
            f"score is {scores[row]:g}; leave the column logit out if it is something else"
        )


def _read_rows(path: pathlib.Path) -> tuple[list[int], list[dict[str, str]]]:
    """Return line numbers and rows, each row a dict from column name to stripped text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(path, header)
            numbered = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except OSError as error:
        raise UserError(f"cannot read predictions {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV text file: {error}") from error
    if not numbered:
        raise UserError(f"{path} has a header and no rows")
    for line, cells in numbered:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}")
    return [line for line, _ in numbered], [dict(zip(header, cells, strict=True)) for _, cells in numbered]


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if missing:
        raise UserError(
            f"{path} lacks the column(s) {', '.join(missing)}; its first line reads {','.join(header) or '(nothing)'}; "
            f"needed are {', '.join(REQUIRED_COLUMNS)}, optional patient, logit, {', '.join(ATTRIBUTES)}"
        )
    doubled = [name for name in (*COLUMNS, *ATTRIBUTES) if header.count(name) > 1]
    if doubled:
        raise UserError(f"{path} has the column(s) {', '.join(doubled)} more than once")


def _text(path: str | os.PathLike, line: int, name: str, row: dict[str, str]) -> str:
    if not row[name]:
        raise UserError(f"{path}, line {line}: the {name} is empty")
    return row[name]


def _number(path: str | os.PathLike, line: int, name: str, row: dict[str, str], wanted: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = np.nan
    allowed = {"label": value in (0, 1), "score": 0 <= value <= 1, "logit": np.isfinite(value)}
    if not allowed[name]:
        raise UserError(f"{path}, line {line}: {name} is {row[name]!r}, needed is {wanted}")
    return value


def _refuse_duplicates(path: str | os.PathLike, lines: list[int], ids: list[str]) -> None:
    first_line: dict[str, int] = {}
    for line, image_id in zip(lines, ids, strict=True):
        if image_id in first_line:
            raise UserError(f"{path}, line {line}: id {image_id} is already on line {first_line[image_id]}")
        first_line[image_id] = line


def write_predictions(
    path: str | os.PathLike,
    *,
    ids: np.ndarray,
    patients: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    scores: np.ndarray,
    attributes: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write id, patient, label, logit, score and attributes as CSV, all or nothing.

    Floats are written in full, so that reading gives them back.

    Raises:
        UserError: columns of different lengths, or a folder that cannot be written.
    """
    path = pathlib.Path(path)
    attributes = attributes or {}
    columns = (ids, patients, labels, logits, scores, *attributes.values())
    if len({len(column) for column in columns}) != 1:
        raise UserError(f"columns of {path} differ in length: {[len(column) for column in columns]}")
    try:
        with replace_when_written(path) as neighbour, neighbour.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *attributes])
            for image_id, patient, label, logit, score, *rest in zip(*columns, strict=True):
                writer.writerow([image_id, patient, int(label), repr(float(logit)), repr(float(score)), *rest])
    except OSError as error:
        raise UserError(f"cannot write predictions {path}: {error.strerror}") from error
