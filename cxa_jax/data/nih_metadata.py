"""The metadata of NIH ChestX-ray14: reads labels, lists and boxes, makes the task's rows, audits the counts."""

import collections
import csv
import dataclasses
import functools
import math
import operator
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from cxa_jax.data.nih_download import Download, name_first, read_label_version
from cxa_jax.errors import UserError

POSITIVE, NEGATIVE = "Cardiomegaly", "No Finding"
FINDINGS = frozenset(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass Nodule "
    "Pleural_Thickening Pneumonia Pneumothorax".split()
) | {NEGATIVE}
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
BOX_FRAME_PX = 1024  # the boxes' frame: the published images' side
# What Data_Entry_2017_v2020.csv and the official lists must give (R1, R3).
PUBLISHED = {
    "images": 112_120, "patients": 30_805, "train_val_list": 86_524, "test_list": 25_596,
    "train_val_positives": 1_707, "train_val_negatives": 50_500, "test_positives": 1_069, "test_negatives": 9_861,
    "boxes": 146,
}  # fmt: skip
_MAX_AGE = 120  # the 2017 file has ages up to 414: those are unknown
_AGE = re.compile(r"(\d+)([YMD]?)")
_DAYS = {"": 365, "Y": 365, "M": 30, "D": 1}


class Row(NamedTuple):
    """One image of the task; `part` is its official list, `boxes` the heart's x, y, w, h in the 1024 px frame."""

    id: str
    patient: str
    label: int
    findings: str
    view: str
    sex: str
    age: int
    part: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The task's rows sorted by id, the label file's version ('2017' or 'v2020'), and the audit's counts."""

    rows: list[Row]
    version: str
    counts: dict[str, int]

    @property
    def has_published_counts(self) -> bool:
        """True if these are the counts of the whole ChestX-ray14 with the v2020 labels (R1, R3)."""
        return not _differences(self.counts)


def load_metadata(download: Download, *, other_findings: bool = False) -> Metadata:
    """Read label file, lists and boxes, and make the task's rows (R2, R3).

    An image is positive if Cardiomegaly is among its findings, negative if its findings are exactly 'No Finding'.
    Images on neither list are left out and counted.

    Args:
      download: where the files are.
      other_findings: images with only other findings are negatives too; False leaves them out, as the paper does.

    Returns:
      Metadata; its counts are of the paper's task either way. If every published image is in a v2020 label file and
      the lists, they equal `PUBLISHED`.

    Raises:
      UserError: for a wrong header or field, a repeated id, a listed image without labels, an image or patient on both
        lists, a box of an unknown image, or complete metadata that does not give the published counts.
    """
    version = read_label_version(download.label_file)
    labels = _read_label_file(download.label_file)
    lists = {part: _read_list(path) for part, path in download.lists.items()}
    part_of = _assign_parts(labels, lists, download)
    boxes = _read_boxes(download.box_file)
    if strangers := sorted(set(boxes) - set(labels)):
        raise UserError(f"{download.box_file}: {len(strangers)} boxed images are not in {download.label_file}: "
                        f"{name_first(strangers)}")  # fmt: skip
    rows = []
    for name in sorted(part_of):
        label = label_of(labels[name]["findings"])
        if label is None and other_findings:
            label = 0
        if label is not None:
            rows.append(Row(name, label=label, part=part_of[name], boxes=tuple(boxes.get(name, ())), **labels[name]))
    counts = _count(labels, lists, rows)
    _check_published(version, counts, download.label_file)
    return Metadata(rows, version, counts)


@functools.cache  # a few hundred combinations of findings, a hundred thousand rows
def label_of(findings: str) -> int | None:
    """Return 1 for Cardiomegaly (with or without others), 0 for exactly 'No Finding', None for neither (R2)."""
    if POSITIVE in findings.split("|"):
        return 1
    return 0 if findings == NEGATIVE else None


def _open_csv(path: pathlib.Path) -> Iterator[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.reader(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error}); fetch it again") from error


def _read_label_file(path: pathlib.Path) -> dict[str, dict]:
    lines = _open_csv(path)
    header = next(lines, [])
    if missing := [column for column in COLUMNS if column not in header]:
        raise UserError(f"{path}: the header lacks the columns {', '.join(missing)}; is it the NIH label file?")
    places = [header.index(column) for column in COLUMNS]
    pick = operator.itemgetter(*places)
    labels, known_findings = {}, set()
    for number, fields in enumerate(lines, start=2):
        if not fields:
            continue
        if len(fields) <= max(places):
            raise UserError(f"{path}, line {number}: {len(fields)} fields, too few; the file is cut or damaged")
        name, findings, patient, age, sex, view = map(str.strip, pick(fields))
        if name in labels:
            raise UserError(f"{path}, line {number}: {name} is there twice")
        if findings not in known_findings:
            if unknown := set(findings.split("|")) - FINDINGS:
                raise UserError(f"{path}, line {number}: unknown finding {', '.join(sorted(unknown))}")
            known_findings.add(findings)
        if not patient.isdecimal():
            raise UserError(f"{path}, line {number}: Patient ID {patient!r} is not a number")
        labels[name] = {"patient": str(int(patient)), "findings": findings, "view": view, "sex": sex,
                        "age": _parse_age(age)}  # fmt: skip
    return labels


@functools.cache
def _parse_age(text: str) -> int:
    match = _AGE.fullmatch(text)
    if not match:
        return -1
    years = int(match[1]) * _DAYS[match[2]] // 365
    return years if years <= _MAX_AGE else -1


def _read_list(path: pathlib.Path) -> set[str]:
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error}); fetch it again") from error
    if repeated := [name for name, times in collections.Counter(names).items() if times > 1]:
        raise UserError(f"{path}: {len(repeated)} names are there twice: {name_first(repeated)}")
    return set(names)


def _assign_parts(labels: Mapping[str, dict], lists: Mapping[str, set[str]], download: Download) -> dict[str, str]:
    both = ", ".join(map(str, download.lists.values()))
    if shared := sorted(lists["train_val"] & lists["test"]):
        raise UserError(f"{len(shared)} images are on both lists ({both}): {name_first(shared)}")
    for part, names in lists.items():
        if strangers := sorted(names - set(labels)):
            raise UserError(f"{download.lists[part]}: {len(strangers)} of {len(names)} images are not in "
                            f"{download.label_file}: {name_first(strangers)}")  # fmt: skip
    patients = {part: {labels[name]["patient"] for name in names} for part, names in lists.items()}
    if shared := sorted(patients["train_val"] & patients["test"]):
        raise UserError(f"{len(shared)} patients are on both lists ({both}): {name_first(shared)}")
    return {name: part for part, names in lists.items() for name in names}


def _read_boxes(path: pathlib.Path) -> dict[str, list[tuple[float, float, float, float]]]:
    # The header has nine fields, the rows six: name, finding, x, y, w, h by position.
    boxes = collections.defaultdict(list)
    for number, fields in enumerate(_open_csv(path), start=1):
        if number == 1 or len(fields) < 2 or fields[1] != POSITIVE:
            continue
        try:
            x, y, w, h = map(float, fields[2:6])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a box: {','.join(fields)}") from error
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            raise UserError(f"{path}, line {number}: not a box: {','.join(fields)}")
        boxes[fields[0]].append((x, y, w, h))
    return boxes


def _count(labels: Mapping[str, dict], lists: Mapping[str, set[str]], rows: Iterable[Row]) -> dict[str, int]:
    rows = [row for row in rows if label_of(row.findings) is not None]  # those of the paper's task
    per_class = collections.Counter((row.part, row.label) for row in rows)
    listed = sum(map(len, lists.values()))
    return {
        "images": len(labels),
        "patients": len({fields["patient"] for fields in labels.values()}),
        "train_val_list": len(lists["train_val"]),
        "test_list": len(lists["test"]),
        "train_val_positives": per_class["train_val", 1],
        "train_val_negatives": per_class["train_val", 0],
        "test_positives": per_class["test", 1],
        "test_negatives": per_class["test", 0],
        "boxes": sum(len(row.boxes) for row in rows),
        "unlisted": len(labels) - listed,
        "other_findings": listed - per_class.total(),
        "unknown_ages": sum(row.age < 0 for row in rows),
    }


def _check_published(version: str, counts: Mapping[str, int], label_file: pathlib.Path) -> None:
    complete = all(counts[name] == PUBLISHED[name] for name in ("images", "train_val_list", "test_list"))
    wrong = _differences(counts)
    if version == "v2020" and complete and wrong:
        raise UserError(f"{label_file}: complete, but its counts are not the published ones: {'; '.join(wrong)}; "
                        "the file or a list was changed, fetch them again")  # fmt: skip


def _differences(counts: Mapping[str, int]) -> list[str]:
    return [
        f"{name} {counts[name]} (published: {number})" for name, number in PUBLISHED.items() if counts[name] != number
    ]
