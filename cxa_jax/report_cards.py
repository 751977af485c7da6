"""The first screen of a report: how good, how sure, where does it look, what went wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cxa_jax.localization_table import find_judged_rules, is_control
from cxa_jax.map_verdict import CONTROL_TITLES, MORAL, judge
from cxa_jax.report_localization import RULE_NAMES, name_map
from cxa_jax.report_ratio import write_ratio_lines
from cxa_jax.report_tables import describe_difference, format_interval, format_number, format_p
from cxa_jax.short_cut_lines import write_energy, write_short_cuts
from cxa_jax.strata import MIN_PATIENTS

SHOWN = 3  # strata, pairs: the tables have all


@dataclass(frozen=True)
class Card:
    """A question, the answer in one line, and what it rests on."""

    question: str
    answer: str
    lines: list[str]


def write_cards(report: dict[str, Any]) -> list[Card]:
    """Answer the four questions for the model of the highest AUROC; the others are named beside it."""
    groups = sorted(report["groups"], key=lambda group: -(group["free"]["auroc"]["estimate"] or 0))
    best = groups[0]
    return [_how_good(report, groups), _how_sure(report, best), _where(groups), _what_went_wrong(best)]


def _how_good(report: dict[str, Any], groups: list[dict[str, Any]]) -> Card:
    best = groups[0]
    lines = [f"{group['name']}: {format_interval(group['free']['auroc'])}" for group in groups[1:]]
    for baseline in report["baselines"]:
        lines.append(f"8x8 thumbnail + logistic regression, same images: {format_interval(baseline['auroc'])}")
    lines += write_ratio_lines(report)
    point = best.get("at_dev_threshold", best["at_0.5"])
    source = "dev's threshold" if "at_dev_threshold" in best else "0.5"
    recall, specificity = format_interval(point["recall"]), format_interval(point["specificity"])
    lines.append(f"at {source}: sensitivity {recall}, specificity {specificity}")
    lines += _list_short_cuts(best, write_short_cuts)
    picked = f", the highest of {len(groups)} models on this test set" if len(groups) > 1 else ""
    return Card("How good?", f"AUROC {format_interval(best['free']['auroc'])}, {best['name']}{picked}", lines)


def _how_sure(report: dict[str, Any], best: dict[str, Any]) -> Card:
    data, auroc = report["data"], best["free"]["auroc"]
    width = auroc["high"] - auroc["low"] if auroc["low"] is not None else float("nan")
    several = len(best["runs"]) > 1
    spread = f"sd over seeds {format_number(auroc['sd_over_seeds'])}" if several else "the spread of seeds is not known"
    lines = [
        f"{data['num_images']:,} test images, {data['num_positives']:,} positive; {data['num_patients']:,} patients, "
        f"{data['num_positive_patients']:,} of them with a positive image",
        f"{len(best['runs'])} run(s) of {best['name']}, {spread}",
    ]
    for pair in report["comparisons"][:SHOWN]:
        bootstrap = pair["bootstrap"]
        lines.append(
            f"{pair['a']} - {pair['b']}: {format_interval(bootstrap)}, p {format_p(bootstrap['p_value'])}: "
            f"{describe_difference(bootstrap)}"
        )
    return Card("How sure?", f"95 % interval {format_number(width)} wide, {data['interval_method'][4:]}", lines)


def _where(groups: list[dict[str, Any]]) -> Card:
    group = next((group for group in groups if group["localization"]), None)
    if group is None:
        return Card("Where does it look?", "unknown: no run with maps of test images that have a box", [])
    part = group["localization"]["all_boxed"]
    if not find_judged_rules(part["rules"]):
        return Card("Where does it look?", "it has no map", [])
    verdicts = judge(part["rules"])
    if not verdicts or part["num_patients"] < MIN_PATIENTS:
        return Card("Where does it look?", f"unknown: boxes of {part['num_patients']} patients are too few", [])
    lines = [f"{group['name']}, {part['num_images'][0]} boxed positives of {part['num_patients']} patients"]
    for verdict in verdicts:
        metrics = verdict.metrics
        lines.append(
            f"boxes by {RULE_NAMES[verdict.rule]}: {verdict.title}: mean IoU {format_interval(metrics['mean_iou'])}, "
            f"box's centre in the true box {format_interval(metrics['box_pointing'])}; paired differences:"
        )
        for control, (iou, pointing) in verdict.gains.items():
            aims = f", pointing {format_interval(pointing)}" if pointing else ""
            lines.append(f"less {CONTROL_TITLES[control]}: mean IoU {format_interval(iou)}{aims}")
    lines.append(MORAL)
    maps = part["rules"][verdicts[0].rule]  # of maps alone: a reader's boxes have neither peak nor energy
    for key, values in maps.items():
        if is_control(key):
            continue
        numbers = f"pointing {format_interval(values['pointing'], 2)}"
        if values["energy_ratio"]:
            numbers += f", energy {format_interval(values['energy_ratio'], 2)} (1 is chance)"
        lines.append(f"{name_map(key)}: {numbers}")
    lines += _list_short_cuts(group, write_energy)
    if "image_centre" in maps:
        lines.append(f"image centre, control: pointing {format_interval(maps['image_centre']['pointing'], 2)}")
    return Card("Where does it look?", "; ".join(verdict.answer for verdict in verdicts), lines)


def _list_short_cuts(group: dict[str, Any], write: Callable[..., list[str]]) -> list[str]:
    """Return the lines on the short cuts of a group's first run that measured them; it is named beside others."""
    for run, short_cuts in zip(group["runs"], group["short_cuts"], strict=True):
        if short_cuts:
            start = f"{run}: " if len(group["runs"]) > 1 else ""
            return [f"{start}{line}" for line in write(short_cuts, format_interval)]
    return []


def _what_went_wrong(best: dict[str, Any]) -> Card:
    run = best["per_run"][0]
    point = run["at_dev_threshold"] or run["at_0.5"]
    (tn, fp), (fn, tp) = point["confusion_matrix"]
    source = f"threshold {format_number(point['threshold'])}, {point['source']}; run {best['runs'][0]}"
    lines = [source]
    known = [row for row in best["strata"] if not row["too_small"]]
    for row in sorted(known, key=lambda row: row["auroc"]["estimate"])[:SHOWN]:
        lines.append(
            f"AUROC {row['by']} {row['name']}: {format_interval(row['auroc'])}, {row['num_images']:,} images of "
            f"{row['num_patients']:,} patients"
        )
    if len(known) > SHOWN:
        lines.append(f"these are the lowest {SHOWN} of {len(known)} strata, picked for being lowest")
    error = run["calibration_error"]
    lines.append(f"calibration error {format_interval(error)} before any scaling")
    answer = f"{fn:,} of {fn + tp:,} positives missed, {fp:,} of {fp + tn:,} negatives called positive"
    return Card("What went wrong?", answer, lines)
