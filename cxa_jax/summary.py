"""The closing lines of a run: the few numbers that a reader looks for first."""

import math
from typing import Any

from cxa_jax.data.datasets import make_title
from cxa_jax.heat_maps import Rule, describe_rule
from cxa_jax.localization_table import TUNED, find_judged_rules, find_leading_map, split_control
from cxa_jax.map_verdict import CONTROL_TITLES, MORAL, judge
from cxa_jax.short_cut_lines import write_energy, write_short_cuts

SHOWN = ("pointing", "energy_ratio", "box_pointing", "mean_iou")


def format_summary(report: dict[str, Any]) -> str:
    """Return the closing lines: AUROC, the paper's row at both thresholds, the baseline, localisation."""
    test = report["test"]
    lines = [
        "CHEST PHANTOM: drawings, not X-rays of patients"
        if report["phantom"]
        else make_title(report["data"], report["views"]),
        f"test: {test['num_images']:,} images, {test['num_positives']:,} positive, {test['num_patients']:,} patients",
        f"test AUROC {_format_interval(test['auroc'])} (95 % interval, bootstrap over patients)",
    ]
    if report["thumbnail_baseline"]:
        baseline, gain = (_format_interval(report["thumbnail_baseline"][name]) for name in ("auroc", "gain"))
        lines.append(f"8x8 thumbnail + logistic regression on the same images: AUROC {baseline}; above it {gain}")
    lines += _format_ratio(report["cardiothoracic_ratio"])
    for name in ("at_0.5", "at_dev_threshold"):
        row = test[name]
        if row is not None:
            lines.append(
                f"at threshold {row['threshold']:.3f}{' (chosen on dev)' if 'dev' in name else ''}: "
                f"accuracy {row['accuracy']:.3f}, cardiomegaly P {row['precision']:.3f} R {row['recall']:.3f} "
                f"F1 {row['f1']:.3f}, weighted P {row['precision_weighted']:.3f} R {row['recall_weighted']:.3f} "
                f"F1 {row['f1_weighted']:.3f}, [[TN, FP], [FN, TP]] = {row['confusion_matrix']}"
            )
    lines += write_short_cuts(report["short_cuts"], _format_interval)
    lines += write_energy(report["short_cuts"], _format_interval)
    return "\n".join(lines + _format_localization(report["localization"]))


def _format_ratio(ratio: dict[str, Any] | None) -> list[str]:
    if ratio is None:
        return []
    error = ratio["reader"]["error"]["natural"]["ratio"]
    line = "cardiothoracic ratio, by regressions fitted on drawings alone (mean absolute error there "
    line += f"{_format_interval(error['mean_absolute_error'])})"
    rows = {"all": ratio["all"]} | ratio["by_view"]
    told = [
        f"{name}: AUROC {_format_interval(row['auroc'])}, less the network's {_format_interval(row['less_network'])}"
        + (
            f", both together above the network {_format_interval(row['with_network_less_network'])}"
            if "with_network" in row
            else ""
        )
        for name, row in rows.items()
        if not row["too_small"]
    ]
    beaten = ["THE RATIO BEATS THE NETWORK"] if ratio["ratio_beats_network"] else []
    return [f"{line}: " + "; ".join([*beaten, *told])] if told else [f"{line}: too few patients to compare"]


def _format_localization(localization: dict[str, Any] | None) -> list[str]:
    if localization is None:
        return []
    rules = localization["all_boxed"]["rules"]
    count, patients = localization["num_images"], localization["num_patients"]
    lines = [f"localisation on {count} boxed positives of {patients} patients"]
    for rule in find_judged_rules(rules) or ["half_max"]:  # without a map: of the controls
        cut = rule.replace("_", " ")
        if rule == TUNED:
            leading = find_leading_map(rules[rule])
            cut += f" rules ({leading}: {describe_rule(Rule(**localization['tuned_rules']['rules'][leading]))})"
        lines.append(f"boxes by {cut}:")
        for name, values in rules[rule].items():
            if split_control(name)[0]:
                continue  # metrics.json has them, and the verdict below the gains over those that count
            shown = {key: values[key] for key in SHOWN if values[key]}
            numbers = ", ".join(f"{key.replace('_', ' ')} {_format_interval(value)}" for key, value in shown.items())
            lines.append(f"  {name.replace('_', ' ')}: {numbers}")
    return lines + _format_verdicts(rules)


def _format_verdicts(rules: dict[str, Any]) -> list[str]:
    lines = []
    for verdict in judge(rules):
        lines.append(f"{verdict.answer}, boxes by {verdict.rule.replace('_', ' ')}; paired, image by image:")
        for control, (iou, pointing) in verdict.gains.items():
            aims = f", pointing {_format_interval(pointing)}" if pointing else ""
            lines.append(f"  less {CONTROL_TITLES[control]}: mean IoU {_format_interval(iou)}{aims}")
    return [*lines, MORAL] if lines else []


def _format_interval(interval: dict[str, float]) -> str:
    if not math.isfinite(interval["low"]):
        return f"{interval['estimate']:.3f} [no interval]" if math.isfinite(interval["estimate"]) else "undefined"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
