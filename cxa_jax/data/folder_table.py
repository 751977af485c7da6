"""One's own labelled images as rows: from folders named by class, or from a CSV."""

import csv
import logging
import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from cxa_jax.data.input_files import SUFFIXES, list_folder
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

SPLIT_NAMES = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
               "test": "test", "testing": "test"}  # fmt: skip
COLUMNS = ("path", "label", "patient", "split", "boxes", "view", "sex", "age")
UNKNOWN_AGE = -1
MAX_AGE = 150


class Row(NamedTuple):
    """One image.

    Attributes:
      id: its path below manual_dir, with '/'.
      path: the file.
      patient: '' if unknown.
      label: 1 or 0.
      split: 'train' | 'dev' | 'test' | '' for us to draw.
      boxes: of the finding, each x, y, w, h in px of the file.
      view, sex: text, '' if unknown.
      age: years, -1 if unknown.
    """

    id: str
    path: pathlib.Path
    patient: str
    label: int
    split: str
    boxes: tuple[tuple[float, ...], ...] = ()
    view: str = ""
    sex: str = ""
    age: int = UNKNOWN_AGE


def read_rows(root: pathlib.Path, options: ConfigDict) -> list[Row]:
    """Read what config.data.folder describes below `root` (config.data.manual_dir), sorted by id.

    Folders: `root`/CLASS/..., or `root`/SPLIT/CLASS/...; a table: the CSV with the columns of COLUMNS, paths relative
    to `root`. A table without `label` adds its columns, such as the patient, to what the folders say.

    Raises:
      UserError: a folder, column or value that has no meaning, a missing file, or a patient that cannot be told. The
        message names the first.
    """
    if not root.is_dir():
        raise UserError(
            f"config.data.manual_dir={root} is no folder; it holds the images of config.data.name=image_folder"
        )
    rows = list(_read_table(root, options) if options.table else _read_folders(root, options))
    if not rows:
        raise UserError(f"no images below {root}")
    pattern = _compile(options.patient_regex)
    rows = [row._replace(patient=row.patient or _find_patient(pattern, row.id)) for row in rows]
    known = sum(bool(row.patient) for row in rows)
    if known == 0:
        log.warning("Patients are unknown: every image counts as its own, so one patient's images may be on both sides "
                    "of a split. Give config.data.folder.patient_regex, or a CSV with a column patient.")  # fmt: skip
    elif known < len(rows):
        first = next(row.id for row in rows if not row.patient)
        raise UserError(f"{len(rows) - known} of {len(rows)} images have no patient, the first is {first}")
    return sorted((row._replace(patient=row.patient or row.id) for row in rows), key=lambda row: row.id)


def _read_folders(root: pathlib.Path, options: ConfigDict) -> Iterator[Row]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folders and all(_fold(folder.name) in SPLIT_NAMES for folder in folders):
        for folder in folders:
            yield from _read_classes(root, folder, SPLIT_NAMES[_fold(folder.name)], options)
    else:
        yield from _read_classes(root, root, "", options)


def _read_classes(root: pathlib.Path, folder: pathlib.Path, split: str, options: ConfigDict) -> Iterator[Row]:
    labels = _class_labels(options)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            raise UserError(f"{path} lies in no class folder; move it to {options.positive} or {options.negative}")
        if path.name.startswith(".") or path.is_file():
            continue
        if _fold(path.name) not in labels:
            raise UserError(
                f"{path} is named neither like a class ({options.positive}, {options.negative}: "
                "config.data.folder.positive and .negative) nor, with all beside it, like a split (train, dev, test)"
            )
        for file in list_folder(path):
            yield Row(file.relative_to(root).as_posix(), file, "", labels[_fold(path.name)], split)


def _read_table(root: pathlib.Path, options: ConfigDict) -> Iterator[Row]:
    table = pathlib.Path(options.table).expanduser()
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            records = [(reader.line_num, record) for record in reader]
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = header
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"config.data.folder.table={table} cannot be read: {error}") from error
    if "path" not in header:
        raise UserError(f"{table} lacks the column path; known are {', '.join(COLUMNS)}")
    in_folders = None if "label" in header else _index_folders(root, options, table)
    seen: dict[str, int] = {}
    for line, record in records:
        values = {(key or "").strip().lower(): (value or "").strip() for key, value in record.items() if key}
        try:
            row = _parse(root, values, options, in_folders)
        except ValueError as error:
            raise UserError(f"{table}, line {line}: {error}") from error
        if row.id in seen:
            raise UserError(f"{table}, line {line}: {row.id} is already on line {seen[row.id]}")
        seen[row.id] = line
        yield row
    unlisted = sorted(set(in_folders or ()) - set(seen))
    if unlisted:
        raise UserError(f"{len(unlisted)} images below {root} are not in {table}, the first is {unlisted[0]}")


def _index_folders(root: pathlib.Path, options: ConfigDict, table: pathlib.Path) -> dict[str, Row]:
    try:
        return {row.id: row for row in _read_folders(root, options)}
    except UserError as error:
        raise UserError(f"{table} lacks the column label, and the folders do not say it: {error}") from error


def _parse(root: pathlib.Path, values: dict[str, str], options: ConfigDict, in_folders: dict[str, Row] | None) -> Row:
    """Return the row of one line; `in_folders` says label and split where the table has no label."""
    labels = _class_labels(options) | {"1": 1, "0": 0}
    image_id, split = pathlib.PurePath(values["path"]).as_posix(), _fold(values.get("split", ""))
    path = root / values["path"]
    if not values["path"] or not _is_file(path):
        raise ValueError(f"there is no file {path}")
    if in_folders is None and _fold(values["label"]) not in labels:
        raise ValueError(f"label {values['label']!r} is none of {', '.join(labels)}")
    if in_folders is not None and image_id not in in_folders:
        raise ValueError(f"{path} lies in no class folder, and there is no column label")
    if split and split not in SPLIT_NAMES:
        raise ValueError(f"split {values['split']!r} is none of {', '.join(SPLIT_NAMES)}")
    boxes = tuple(_parse_box(text) for text in values.get("boxes", "").split(";") if text.strip())
    age = _parse_age(values.get("age", ""))
    return Row(
        id=image_id,
        path=path,
        patient=values.get("patient", ""),
        label=labels[_fold(values["label"])] if in_folders is None else in_folders[image_id].label,
        split=SPLIT_NAMES.get(split, "" if in_folders is None else in_folders[image_id].split),
        boxes=boxes,
        view=values.get("view", ""),
        sex=values.get("sex", ""),
        age=age,
    )


def _parse_box(text: str) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in text.split())
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(numbers[2:]) <= 0:
        raise ValueError(f"box {text.strip()!r} is not `x y w h` in px; several are separated by ;")
    return numbers


def _parse_age(text: str) -> int:
    years = float(text) if text else UNKNOWN_AGE
    if years != UNKNOWN_AGE and not 0 <= years <= MAX_AGE:  # also true of nan
        raise ValueError(f"age {text!r} is not a number of years from 0 to {MAX_AGE}")
    return int(years)


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one
        return False


def _class_labels(options: ConfigDict) -> dict[str, int]:
    labels = {_fold(options.positive): 1, _fold(options.negative): 0}
    if len(labels) != 2:
        raise UserError(f"config.data.folder.positive and .negative are both {options.positive!r}")
    return labels


def _compile(pattern: str) -> re.Pattern | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"config.data.folder.patient_regex={pattern!r}: {error}") from error


def _find_patient(pattern: re.Pattern | None, image_id: str) -> str:
    match = pattern.search(image_id) if pattern else None
    return "" if match is None else match[1] if pattern.groups else match[0]


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())
