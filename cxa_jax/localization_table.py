"""Localisation scores of every boxed image under every map and rule: as a CSV file, and summed up with intervals."""

import csv
import io
import math
import os
import pathlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cxa_jax.errors import UserError
from cxa_jax.group_statistics import bootstrap_group_means
from cxa_jax.intervals import Interval
from cxa_jax.localization import IOBB_THRESHOLDS, LocalizationScores, compute_columns, find_kind
from cxa_jax.scored_maps import ALL_MAPS, THUMBNAIL
from cxa_jax.workdir import write_atomically

FALSE_POSITIVES = tuple(f"false_positives_iobb_{threshold:g}" for threshold in IOBB_THRESHOLDS)
SCALARS = ("num_boxes", "iou", "iobb", "pointing", "box_pointing", "energy_ratio", "heart_energy_ratio")
BOX = ("x", "y", "w", "h")
COLUMNS = ("map", "rule", "id", "patient", "predicted_positive", *SCALARS, *FALSE_POSITIVES, *BOX)
SETS = ("all_boxed", "predicted_positives")
CONTROLS = ("median_box", "image_centre", "random_map", "grid_box", THUMBNAIL)
LEADING = (ALL_MAPS, "attention", "evidence")  # what answers for a model, fixed before any is scored: the first it has
TUNED = "phantom_tuned"  # the rule that was tuned on phantoms' dev split, for each map its own
READER = "phantom_reader"  # the rule by which a regression fitted on phantoms reads a box (`box_reader`)
ANSWERING = (TUNED, "half_max", READER)  # the rule that answers for a model: the first that has a leading map
# Controls that each map has of its own, as CONTROL_NAME, under ANSWERING rules: what it says whatever the image.
RANDOM_WEIGHTS, MEAN_MAP, SHUFFLED = "random_weights", "mean_map", "shuffled"
MAP_CONTROLS = (MEAN_MAP, SHUFFLED, RANDOM_WEIGHTS)
MAP_CONTROL_METRICS = ("mean_iou", "pointing", "box_pointing", "energy_ratio", "heart_energy_ratio", "miss_rate")
GAINED = ("iou", "pointing", "energy_ratio")  # fields of the scores that a map is held against its controls in
SHARED_CONTROLS = {"median_box": GAINED[:2], THUMBNAIL: GAINED}  # the same for all maps of a run
GAINS = {  # control -> metrics: a map's value less the control's, of the same images; a box has no energy
    control: tuple(f"{metric}_above_{control}" for metric in metrics)
    for control, metrics in (SHARED_CONTROLS | dict.fromkeys(MAP_CONTROLS, GAINED)).items()
}
GAIN = GAINS["median_box"][0]


@dataclass(frozen=True)
class LocalizationTable:
    """Scores of the same N images under each (map, rule).

    Attributes:
        ids: text [N].
        predicted_positive: bool [N], score at or above the threshold chosen on dev.
        scores: (map, rule) -> LocalizationScores.
    """

    ids: np.ndarray
    predicted_positive: np.ndarray
    scores: dict[tuple[str, str], LocalizationScores]

    @property
    def patients(self) -> np.ndarray:
        """Patient of each image, [N]."""
        return next(iter(self.scores.values())).patients

    @property
    def answering_rule(self) -> str | None:
        """The rule that the model is judged by (`find_answering_rule`)."""
        return find_answering_rule({rule: [n for n, of in self.scores if of == rule] for _, rule in self.scores})

    def take(self, keep: np.ndarray) -> Self:
        """Return the rows of a boolean index."""
        scores = {key: values.subset(keep) for key, values in self.scores.items()}
        return type(self)(self.ids[keep], self.predicted_positive[keep], scores)


def is_control(name: str) -> bool:
    """Tell whether a map's name is that of a control."""
    return name in CONTROLS or split_control(name)[0] is not None


def split_control(name: str) -> tuple[str | None, str]:
    """Return (control, map) of a map's own control, such as ('shuffled', 'cam'); (None, name) of any other."""
    found = next((control for control in MAP_CONTROLS if name.startswith(f"{control}_")), None)
    return found, name.removeprefix(f"{found}_")


def find_leading_map(names: Iterable[str]) -> str | None:
    """Return the map that a model is judged by, so that none is picked by its score; None if there is none."""
    own = [name for name in names if not is_control(name)]
    return next((name for name in (*LEADING, *own) if name in own), None)


def find_answering_rule(rules: Mapping[str, Iterable[str]]) -> str | None:
    """Return the rule that a model is judged by; `rules` is rule -> names of maps. None if it has no map."""
    return next(iter(find_judged_rules(rules)), None)


def find_judged_rules(rules: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the rules that something is said of: the first of maps alone, and the fitted reader's if there is one."""
    known = [rule for rule in ANSWERING if find_leading_map(rules.get(rule, ()))]
    return [rule for rule in known if rule in (known[0], READER)]


def write_localization(path: pathlib.Path, table: LocalizationTable) -> None:
    """Write one row for each map, rule and image, all or nothing; what is undefined is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (name, rule), scores in table.scores.items():
        for row, image_id in enumerate(table.ids):
            values = [getattr(scores, field)[row] for field in SCALARS]
            values += [*scores.false_positives[row], *scores.predicted[row]]
            cells = ["" if math.isnan(value) else repr(float(value)) for value in values]
            writer.writerow([name, rule, image_id, scores.patients[row], int(table.predicted_positive[row]), *cells])
    write_atomically(path, text.getvalue())


def read_localization(path: str | os.PathLike) -> LocalizationTable:
    """Read what `write_localization` wrote.

    Raises:
        UserError: another header, or a row that does not fit; the message names the file.
    """
    with pathlib.Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise UserError(f"{path} has other columns than this version writes; run --mode=evaluate again")
        rows = list(reader)
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for line, row in enumerate(rows, 2):
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}, line {line}: {len(row)} cells where the header has {len(COLUMNS)}")
        groups.setdefault((row[0], row[1]), []).append(row[2:])
    if not groups:
        raise UserError(f"{path} has a header and no rows")
    ids = np.array([row[0] for row in next(iter(groups.values()))])
    flags = np.array([row[2] == "1" for row in next(iter(groups.values()))])
    return LocalizationTable(ids, flags, {key: _read_scores(group) for key, group in groups.items()})


def _read_scores(rows: list[list[str]]) -> LocalizationScores:
    numbers = np.array([[float(cell or "nan") for cell in row[3:]] for row in rows])
    first, second = len(SCALARS), len(SCALARS) + len(FALSE_POSITIVES)
    return LocalizationScores(
        patients=np.array([row[1] for row in rows]),
        predicted=numbers[:, second:],
        false_positives=numbers[:, first:second],
        **dict(zip(SCALARS, numbers[:, :first].T, strict=True)),
    )


def summarize_tables(tables: Sequence[LocalizationTable], *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Compute means and patient-bootstrap intervals over one run, or over several runs on the same images.

    Returns:
        set ('all_boxed', 'predicted_positives') -> {num_images, num_patients, rules}, where rules is
        rule -> map -> metric -> {estimate, low, high}, or None where nothing is defined, such as the overlap of a
        centre. The metrics are `localization.compute_columns`, of a map's own controls `MAP_CONTROL_METRICS`, and of
        maps also `GAINS`, where they have that control. Maps and rules that
        one of the runs lacks, such as a map of one value everywhere, are left out. Several runs give the mean over
        runs, with the variance between seeds in its interval.

    Raises:
        UserError: the runs have other boxed images.
    """
    first = tables[0]
    if any(not np.array_equal(first.ids, table.ids) for table in tables):
        raise UserError("runs of one model have other boxed images; test them on the same data")
    shared = [key for key in first.scores if all(key in table.scores for table in tables)]
    columns = [{key: _columns(table.scores, *key, shared) for key in shared} for table in tables]
    report = {}
    for which in SETS:
        keeps = [np.ones(len(t.ids), bool) if which == "all_boxed" else t.predicted_positive for t in tables]
        either = np.any(keeps, axis=0)
        rules: dict[str, dict[str, Any]] = {}
        for rule in dict.fromkeys(rule for _, rule in shared):
            # All maps of a rule at once: they share their resamples.
            runs = [
                {
                    (name, metric): np.where(keep, values, np.nan)[either]
                    for name, of_rule in scored
                    if of_rule == rule
                    for metric, values in scored[name, of_rule].items()
                }
                for keep, scored in zip(keeps, columns, strict=True)
            ]
            kinds = {key: _find_kind(key[1]) for key in runs[0]}
            options = {"num_resamples": num_resamples, "seed": seed}
            summary = bootstrap_group_means(runs, first.patients[either], kinds, **options)
            maps = rules.setdefault(rule, {})
            for (name, metric), value in summary.items():
                maps.setdefault(name, {})[metric] = _describe(value)
        report[which] = {
            "num_images": [int(keep.sum()) for keep in keeps],
            "num_patients": len(np.unique(first.patients[either])),
            "rules": rules,
        }
    return report


def _find_kind(metric: str) -> str:
    if any(metric in metrics for metrics in GAINS.values()):
        return "ratio_difference" if metric.startswith("energy_ratio") else "difference"
    return find_kind(metric)


def _columns(
    scores: Mapping[tuple[str, str], LocalizationScores], name: str, rule: str, shared: Container[tuple[str, str]]
) -> dict[str, np.ndarray]:
    own = scores[name, rule]
    columns = compute_columns(own)
    if split_control(name)[0]:
        return {metric: columns[metric] for metric in MAP_CONTROL_METRICS}
    if is_control(name):
        return columns
    for control, metrics in GAINS.items():
        key = (control if control in SHARED_CONTROLS else f"{control}_{name}", rule)
        if key in shared:
            for metric, field in zip(metrics, GAINED, strict=False):
                columns[metric] = getattr(own, field) - getattr(scores[key], field)
    return columns


def _describe(value: Interval) -> dict[str, float] | None:
    if not math.isfinite(value.estimate):
        return None
    return {"estimate": value.estimate, "low": value.low, "high": value.high}
