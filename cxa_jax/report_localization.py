"""Localisation tables of a report: every map under every rule, always beside the controls."""

from typing import Any

from cxa_jax.heat_maps import Rule, describe_rule
from cxa_jax.localization import IOBB_THRESHOLDS
from cxa_jax.localization_table import (
    CONTROLS,
    GAIN,
    GAINS,
    MAP_CONTROLS,
    READER,
    SETS,
    TUNED,
    find_answering_rule,
    is_control,
    split_control,
)
from cxa_jax.map_evaluation import PROTOCOL
from cxa_jax.map_verdict import CONTROL_TITLES, MORAL
from cxa_jax.report_tables import Table, format_interval, format_number
from cxa_jax.scored_maps import THUMBNAIL, title_map

CONTROL_NAMES = {
    "median_box": "control: median box of the other patients",
    "image_centre": "control: image centre",
    "random_map": "control: random map",
    "grid_box": "reference: true box in whole cells",
    THUMBNAIL: "control: the image's thumbnail",
}
RULE_NAMES = {
    "half_max": "half the maximum, largest component",
    "otsu": "Otsu, largest component",
    "wang": "60 and 180 of 255, every component (Wang 2017)",
    TUNED: "a rule tuned on phantoms",
    READER: "ridge regression fitted on phantoms' dev hearts",
}
SET_NAMES = {"all_boxed": "all boxed positives", "predicted_positives": "boxed positives that the model calls positive"}
HEAD = ("model", "map", "images (patients)")
OVERLAP = ("mean_iou", GAIN, "accuracy_iou_0.1", "accuracy_iou_0.3", "accuracy_iou_0.5", "accuracy_iou_0.7")
POINTING = ("pointing", "box_pointing", "energy_ratio", "heart_energy_ratio", "miss_rate")
THRESHOLD_FREE = {
    "max_box_acc_v2": "MaxBoxAccV2",
    "max_box_acc_0.3": "IoU .3",
    "max_box_acc_0.5": "IoU .5",
    "max_box_acc_0.7": "IoU .7",
    "px_ap": "PxAP",
}
# Accuracy and average false positives at each of IOBB_THRESHOLDS, of Cardiomegaly (Wang et al. 2017).
WANG_PUBLISHED = ((0.9931, 0.3506), (0.9794, 0.4553), (0.8767, 0.5630), (0.7260, 0.6616), (0.6849, 0.7226))


def name_map(name: str) -> str:
    """Return the reader's name of a map or control."""
    control, of_map = split_control(name)
    if control:
        return f"control: {title_map(of_map)}, {CONTROL_TITLES[control]}"
    return CONTROL_NAMES[name] if is_control(name) else title_map(name)


def tabulate_localization(report: dict[str, Any]) -> list[Table]:
    """Return a table of overlap and one of gains for each set of images and rule, of IoBB, and without a threshold."""
    groups = [group for group in report["groups"] if group["localization"]]
    if not groups:
        return []
    found = {rule for group in groups for rule in group["localization"]["all_boxed"]["rules"]}
    tables = []
    for which in SETS:
        for rule in RULE_NAMES:
            if rule in found:
                tables += [_tabulate_overlap(groups, which, rule), _tabulate_gains(groups, which, rule)]
    tables += [_tabulate_iobb(groups, which, report["phantom"]) for which in SETS]
    return [table for table in [*tables, _tabulate_threshold_free(groups)] if table.rows]


def _rows_of(groups: list[dict[str, Any]], which: str, rule: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Return ([model, map, images and patients], metrics): each model's maps, then controls.

    A control stands once where it is the same for all models, and after each model where it is not. Maps' own controls
    have tables of their own.
    """
    rows, controls = [], {}
    for group in groups:
        part = group["localization"][which]
        values = part["rules"].get(rule, {})
        rows += [
            ([group["name"], name_map(name), _count(part)], values[name]) for name in values if not is_control(name)
        ]
        for name in CONTROLS:
            seen = controls.setdefault(name, [])
            if name in values and not any(_look_alike(values[name], metrics) for _, _, metrics in seen):
                seen.append((group["name"], _count(part), values[name]))
    for name, seen in controls.items():
        for model, counts, metrics in seen:
            rows.append(([f"images of {model}" if len(seen) > 1 else "all", name_map(name), counts], metrics))
    return rows


def _count(part: dict[str, Any]) -> str:
    return f"{', '.join(str(count) for count in part['num_images'])} ({part['num_patients']})"


def _tabulate_gains(groups: list[dict[str, Any]], which: str, rule: str) -> Table:
    rows = []
    for group in groups:
        part = group["localization"][which]
        maps = part["rules"].get(rule, {})
        for name in (name for name in maps if not is_control(name)):
            for control, gains in GAINS.items():
                beside = maps.get(f"{control}_{name}" if control in MAP_CONTROLS else control)
                cells = [format_interval(maps[name].get(gain)) for gain in gains]
                if beside and any(maps[name].get(gain) for gain in gains):
                    own = [format_interval(beside.get(metric)) for metric in ("mean_iou", "pointing")]
                    names = [group["name"], name_map(name), CONTROL_TITLES[control], _count(part)]
                    rows.append([*names, *own, *cells, *["-"] * (3 - len(cells))])
    head = ["model", "map", "control", "images (patients)", "control's mean IoU", "control's pointing"]
    head += ["gain in IoU", "gain in pointing", "gain in energy ratio"]
    note = (
        "Is it only the prior? The map less its control, image by image. Mean map: of training images, for every image "
        f"the same; another patient's: of a positive drawn once from the run's seed. {MORAL}"
    )
    title = f"Maps less their controls, {SET_NAMES[which]}, boxes by {RULE_NAMES[rule]}"
    return Table(title, head, rows, note, folded=(which, rule) != ("all_boxed", _open_rule(groups)))


def _tabulate_threshold_free(groups: list[dict[str, Any]]) -> Table:
    rows, notes = [], []
    for group in groups:
        for run, facts in zip(group["runs"], group["localization"]["threshold_free"], strict=True):
            if facts:
                notes = [facts["protocol"]]
                rows += [
                    [run, name_map(name), *(format_interval(values.get(metric)) for metric in THRESHOLD_FREE)]
                    for name, values in facts["maps"].items()
                ]
    head = ["run", "map", *(title for title in THRESHOLD_FREE.values())]
    return Table("Maps without a threshold, all boxed positives", head, rows, "".join(notes), folded=True)


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
        note = f"{_describe_rules(groups)} {note}"
    if rule == READER:
        note = (
            "A regression finds the heart in the image's thumbnail and in maps of random weights, too: a map counts "
            f"for its network only by what it has above these. {note}"
        )
    return Table(title, head, rows, note, folded=(which, rule) != ("all_boxed", _open_rule(groups)))


def _open_rule(groups: list[dict[str, Any]]) -> str | None:
    """Return the rule that answers for the first model: its tables are shown, the others on demand."""
    return find_answering_rule(groups[0]["localization"]["all_boxed"]["rules"])


def _describe_rules(groups: list[dict[str, Any]]) -> str:
    texts = []
    for group in groups:
        for run, chosen in zip(group["runs"], group["localization"]["tuned_rules"], strict=True):
            if chosen:
                rules = "; ".join(
                    f"{name_map(name)}: {describe_rule(Rule(**rule))}"
                    for name, rule in chosen["rules"].items()
                    if not split_control(name)[0]  # metrics.json has them: three for each map would bury it
                )
                texts.append(f"{run}: {rules}; by {chosen['source']}.")
    return " ".join(texts)


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
    names = {"mean_iou": "mean IoU", GAIN: "less the median box's"}
    return names.get(column, column.replace("accuracy_iou_", "IoU > ").replace("_", " "))
