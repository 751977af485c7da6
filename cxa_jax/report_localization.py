"""Localisation tables of a report: every map under every rule, always beside the controls."""

from typing import Any

from cxa_jax.box_reader import ALL_MAPS, WITH_MAPS
from cxa_jax.localization import IOBB_THRESHOLDS
from cxa_jax.localization_table import (
    CONTROLS,
    GAIN,
    GAINS,
    RANDOM_WEIGHTS,
    READER,
    SETS,
    THUMBNAIL,
    THUMBNAIL_GAIN,
    TUNED,
)
from cxa_jax.map_evaluation import PROTOCOL
from cxa_jax.report_tables import Table, format_interval, format_number

MAP_NAMES = {
    "attention": "attention W",
    "weights": "pooling weights p",
    "evidence": "class evidence",
    "cam": "CAM",
    "grad_cam": "Grad-CAM",
    ALL_MAPS: "all maps together",
    WITH_MAPS: "thumbnail and all maps",
    THUMBNAIL: "control: the image's thumbnail",
    "median_box": "control: median box of the other patients",
    "image_centre": "control: image centre",
    "random_map": "control: random map",
    "grid_box": "reference: true box in whole cells",
}
RULE_NAMES = {
    "half_max": "half the maximum, largest component",
    "otsu": "Otsu, largest component",
    "wang": "60 and 180 of 255, every component (Wang 2017)",
    TUNED: "a level tuned on phantoms, largest component",
    READER: "ridge regression fitted on phantoms' dev hearts",
}
SET_NAMES = {"all_boxed": "all boxed positives", "predicted_positives": "boxed positives that the model calls positive"}
HEAD = ("model", "map", "images (patients)")
OVERLAP = ("mean_iou", *GAINS, "accuracy_iou_0.1", "accuracy_iou_0.3", "accuracy_iou_0.5", "accuracy_iou_0.7")
POINTING = ("pointing", "energy_ratio", "heart_energy_ratio", "miss_rate")
# Accuracy and average false positives at each of IOBB_THRESHOLDS, of Cardiomegaly (Wang et al. 2017).
WANG_PUBLISHED = ((0.9931, 0.3506), (0.9794, 0.4553), (0.8767, 0.5630), (0.7260, 0.6616), (0.6849, 0.7226))


def name_map(name: str) -> str:
    """Return the reader's name of a map or control."""
    if name.startswith(RANDOM_WEIGHTS):
        return f"control: {MAP_NAMES[name.removeprefix(RANDOM_WEIGHTS)]} of random weights"
    return MAP_NAMES[name]


def tabulate_localization(report: dict[str, Any]) -> list[Table]:
    """Return a table of overlap for each set of images and rule, and one of IoBB under Wang's rule."""
    groups = [group for group in report["groups"] if group["localization"]]
    if not groups:
        return []
    found = {rule for group in groups for rule in group["localization"]["all_boxed"]["rules"]}
    tables = [_tabulate_overlap(groups, which, rule) for which in SETS for rule in RULE_NAMES if rule in found]
    return [*tables, *(_tabulate_iobb(groups, which, report["phantom"]) for which in SETS)]


def _rows_of(groups: list[dict[str, Any]], which: str, rule: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Return ([model, map, images and patients], metrics): each model's maps and their random-weight twins, controls.

    A control stands once where it is the same for all models, and after each model where it is not.
    """
    rows, controls = [], {}
    for group in groups:
        part = group["localization"][which]
        counts = f"{', '.join(str(count) for count in part['num_images'])} ({part['num_patients']})"
        values = part["rules"].get(rule, {})
        own = [name for name in values if name not in CONTROLS]
        rows += [([group["name"], name_map(name), counts], values[name]) for name in own]
        for name in CONTROLS:
            seen = controls.setdefault(name, [])
            if name in values and not any(_look_alike(values[name], metrics) for _, _, metrics in seen):
                seen.append((group["name"], counts, values[name]))
    for name, seen in controls.items():
        for model, counts, metrics in seen:
            rows.append(([f"images of {model}" if len(seen) > 1 else "all", name_map(name), counts], metrics))
    return rows


def _look_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return [format_interval(value) for value in a.values()] == [format_interval(value) for value in b.values()]


def _tabulate_overlap(groups: list[dict[str, Any]], which: str, rule: str) -> Table:
    found = _rows_of(groups, which, rule)
    columns = [name for name in (*OVERLAP, *POINTING) if any(values.get(name) for _, values in found)]
    rows = [[*names, *(format_interval(values.get(column)) for column in columns)] for names, values in found]
    head = [*HEAD, *(_column_name(column) for column in columns)]
    title = f"Localisation, {SET_NAMES[which]}, boxes by {RULE_NAMES[rule]}"
    note = (
        f"{PROTOCOL}. Energy: share of the map inside the box over the box's share of the image, 1 is chance. "
        "A map that does not beat the constant box has shown nothing; the gain over it is paired, image by image."
    )
    if rule == "wang":
        note = f"{note} Of the boxes of a map the one of the largest overlap counts, of which a control has one."
    if rule == TUNED:
        note = f"{_describe_levels(groups)} {note}"
    if rule == READER:
        note = (
            "A regression finds the heart in the image's thumbnail and in maps of random weights, too: a map counts "
            f"for its network only by what it has above these. {note}"
        )
    return Table(title, head, rows, note, folded=(which, rule) != ("all_boxed", "half_max"))


def _describe_levels(groups: list[dict[str, Any]]) -> str:
    texts = []
    for group in groups:
        for run, chosen in zip(group["runs"], group["localization"]["levels"], strict=True):
            if chosen:
                levels = ", ".join(f"{name_map(name)} {level:g}" for name, level in chosen["levels"].items())
                texts.append(f"{run}: {levels}, by {chosen['source']}.")
    return f"Levels of the scaled map. {' '.join(texts)}"


def _tabulate_iobb(groups: list[dict[str, Any]], which: str, phantom: bool) -> Table:
    rows = []
    for names, values in _rows_of(groups, which, "wang"):
        cells = []
        for threshold in IOBB_THRESHOLDS:
            accuracy, false = (
                values.get(f"accuracy_iobb_{threshold:g}"),
                values.get(f"false_positives_iobb_{threshold:g}"),
            )
            cells.append(f"{format_interval(accuracy)} / {format_interval(false, 2)}")
        if any(value for name, value in values.items() if name.startswith("accuracy_iobb")):
            rows.append([*names, *cells])
    if not phantom and which == "all_boxed":
        cells = [f"{format_number(hits)} / {format_number(false, 2)}" for hits, false in WANG_PUBLISHED]
        rows.append(["Wang 2017, published", "their CAM", "146", *cells])
    head = [*HEAD, *(f"T(IoBB) {threshold:g}" for threshold in IOBB_THRESHOLDS)]
    title = f"Accuracy / average false positives, {SET_NAMES[which]}, {RULE_NAMES['wang']}"
    return Table(title, head, rows, "IoBB: intersection over the detected area (Wang 2017).", folded=True)


def _column_name(column: str) -> str:
    names = {"mean_iou": "mean IoU", GAIN: "less the median box's", THUMBNAIL_GAIN: "less the thumbnail's"}
    return names.get(column, column.replace("accuracy_iou_", "IoU > ").replace("_", " "))
