"""Figures of a report that plot numbers: ROC (Fig. 6), confusion (Fig. 5), calibration, strata, overlap, training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxa_jax.figures import PHANTOM_MARK
from cxa_jax.localization import IOU_THRESHOLDS
from cxa_jax.localization_table import find_answering_rule, is_control
from cxa_jax.metrics import compute_roc_curve
from cxa_jax.report_localization import RULE_NAMES, name_map
from cxa_jax.report_numbers import Group
from cxa_jax.statistics import resample_patients

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")  # Okabe and Ito
LINES = ("-", "--", "-.", ":")
NUM_BAND_RESAMPLES = 300
FPR_GRID = np.linspace(0, 1, 201)


@dataclass(frozen=True)
class Picture:
    """A figure with the file name it gets, its title and its caption on the page."""

    name: str
    title: str
    caption: str
    figure: Figure


def create_figure(width: float, height: float, phantom: bool) -> Figure:
    """Return an empty figure (inches); one of phantoms says so."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if phantom:
        figure.suptitle(PHANTOM_MARK, fontsize=9, color="#8a3a00")
    return figure


def create_panels(
    num_panels: int, max_columns: int, size: tuple[float, float], margin: tuple[float, float], phantom: bool
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of `num_panels` axes in rows, each `size` wide and high, with a margin over all (inches)."""
    columns = min(max_columns, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = create_figure(size[0] * columns + margin[0], size[1] * rows + margin[1], phantom)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    return figure, panels[:num_panels]


def style_of(index: int) -> dict[str, Any]:
    """Return colour and line of the index-th model: told apart without colour, too."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)]}


def draw_roc(groups: Sequence[Group], phantom: bool, seed: int) -> Picture:
    """Draw ROC curves with patient-bootstrap bands: (a) models with attention, (b) the others (Fig. 6)."""
    parts = [[g for g in groups if g.has_attention], [g for g in groups if not g.has_attention]]
    parts = [part for part in parts if part]
    figure = create_figure(5.2 * len(parts) + 0.4, 5.2, phantom)
    for letter, axes, part in zip("ab", figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=False):
        for group in part:
            index = [other.name for other in groups].index(group.name)  # a model keeps its colour in both panels
            mean, low, high = compute_roc_band(group, seed)
            interval = group.statistics["free"]["auroc"].interval
            text = f"{group.name}: {interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
            axes.plot(FPR_GRID, mean, label=text, **style_of(index))
            axes.fill_between(FPR_GRID, low, high, color=style_of(index)["color"], alpha=0.15, linewidth=0)
        axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01), aspect=1)
        axes.legend(loc="lower right", fontsize=8, title="AUROC [95 %]")
        axes.set_title(f"({letter})", loc="left", fontsize=10)
    test = groups[0].results[0].test
    caption = (
        f"{len(test):,} images, {int(test.label.sum()):,} positive. Mean over runs; bands: 95 % of "
        f"{NUM_BAND_RESAMPLES} resamples of patients, point by point."
    )
    return Picture("fig6_roc", "Fig. 6: ROC", caption, figure)


def compute_roc_band(group: Group, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return TPR on FPR_GRID, mean over runs, and its 2.5 and 97.5 percentiles over resampled patients."""
    test, means, samples = group.results[0].test, [], 0
    for result in group.results:
        score = result.test.score
        fpr, tpr, _ = compute_roc_curve(test.label, score)
        means.append(np.interp(FPR_GRID, fpr, tpr) if len(fpr) else np.full(len(FPR_GRID), np.nan))
        order = np.argsort(-score, kind="stable")
        last_of_ties = np.flatnonzero(np.diff(score[order], append=-np.inf))
        positive, rows = test.label[order], []
        for weights in resample_patients(test.patient, len(test), NUM_BAND_RESAMPLES, seed):
            ranked = weights[:, order]
            tp, fp = (np.cumsum(ranked * part, axis=1)[:, last_of_ties] for part in (positive, 1 - positive))
            tp, fp = (np.pad(counts, ((0, 0), (1, 0))) for counts in (tp, fp))  # the curve begins at (0, 0)
            with np.errstate(invalid="ignore"):  # a resample of one class: nan, left out below
                rows += [np.interp(FPR_GRID, f / f[-1], t / t[-1]) for f, t in zip(fp, tp, strict=True)]
        samples = samples + np.array(rows)
    samples = samples / len(group.results)
    samples = samples[np.isfinite(samples).all(1)]
    low, high = np.percentile(samples, [2.5, 97.5], axis=0) if len(samples) else (means[0], means[0])
    return np.mean(means, axis=0), low, high


def draw_confusion(report: dict[str, Any], phantom: bool) -> Picture:
    """Draw the confusion matrices of each model's first run at both thresholds (Fig. 5)."""
    cells = [
        (group["name"], run[section])
        for section in ("at_0.5", "at_dev_threshold")
        for group in report["groups"]
        if (run := group["per_run"][0])[section]
    ]
    columns = min(4, len(report["groups"]))
    figure, panels = create_panels(len(cells), columns, (3.1, 2.9), (0.0, 0.3), phantom)
    for axes, (name, point) in zip(panels, cells, strict=True):
        matrix = np.array(point["confusion_matrix"])
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        for row, column in np.ndindex(2, 2):
            colour = "white" if shares[row, column] < 0.5 else "black"
            text = f"{matrix[row, column]:,}\n{shares[row, column]:.1%}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)
        axes.set_xticks((0, 1), ("no finding", "cardiomegaly"), fontsize=8)
        axes.set_yticks((0, 1), ("no\nfinding", "cardio-\nmegaly"), fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        source = "fixed" if point["source"] == "fixed" else "chosen on dev"
        axes.set_title(f"{name}\nthreshold {point['threshold']:.3f}, {source}", fontsize=9)
    caption = "Counts, and shares of the row. First run of each model; all runs stand in Table 1."
    return Picture("fig5_confusion", "Fig. 5: confusion matrices", caption, figure)


def draw_reliability(report: dict[str, Any], phantom: bool) -> Picture:
    """Draw the observed share of positives against the score, before and after scaling on dev."""
    groups = report["groups"]
    figure, panels = create_panels(len(groups), 4, (3.4, 3.9), (0.6, 0.5), phantom)
    for axes, group in zip(panels, groups, strict=True):
        run = group["per_run"][0]
        fits = run["calibration"] or {"before": run}
        axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        for index, name in enumerate(key for key in ("before", "temperature", "platt") if key in fits):
            curve = {key: _as_floats(values) for key, values in fits[name]["reliability"].items()}
            error = fits[name]["calibration_error"]["estimate"]
            drawn = curve["count"] > 0
            x, y = curve["mean_score"][drawn], curve["positive_share"][drawn]
            axes.plot(x, y, linewidth=1, label=f"{name}: {error:.3f}", **style_of(index))
            areas = 4 + 300 * curve["count"][drawn] / curve["count"].sum()
            axes.scatter(x, y, s=areas, marker="osD"[index], color=style_of(index)["color"], alpha=0.7)
        axes.set(xlabel="score", ylabel="share of positives", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set_title(group["name"], fontsize=9)
        axes.legend(fontsize=7, title="calibration error", title_fontsize=7)
    caption = (
        "First run of each model, 15 bins of equal width; a mark's area is its share of images. Temperature and Platt "
        "scaling were fitted on dev."
    )
    return Picture("reliability", "Reliability", caption, figure)


def _as_floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def draw_strata(report: dict[str, Any], phantom: bool) -> Picture | None:
    """Draw AUROC with its interval by stratum; None where every stratum is too small or nothing is known."""
    names = [f"{row['by']}: {row['name']}" for row in report["groups"][0]["strata"] if not row["too_small"]]
    if not names:
        return None
    figure = create_figure(8, 0.45 * len(names) + 1.8, phantom)
    axes = figure.subplots()
    shift = 0.7 / len(report["groups"])
    for index, group in enumerate(report["groups"]):
        shown = [(f"{row['by']}: {row['name']}", row["auroc"]) for row in group["strata"] if not row["too_small"]]
        places = [names.index(name) + shift * (index + 0.5) - 0.35 for name, _ in shown]
        ends = [[value["estimate"] - value["low"], value["high"] - value["estimate"]] for _, value in shown]
        centres, colour = [value["estimate"] for _, value in shown], style_of(index)["color"]
        errors = np.clip(np.array(ends).T, 0, None)
        axes.errorbar(
            centres, places, xerr=errors, fmt="osD^v"[index % 5], color=colour, label=group["name"], capsize=2
        )
        axes.axvline(group["free"]["auroc"]["estimate"], color=colour, linewidth=0.7, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("AUROC [95 %]; dotted: all images")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return Picture(
        "strata", "AUROC by stratum", "95 % intervals; counts are in the table. Too-small strata are left out.", figure
    )


def draw_overlap(report: dict[str, Any], phantom: bool) -> Picture | None:
    """Draw the share of images whose box exceeds each IoU, for every map and the constant box; None without boxes."""
    groups = [group for group in report["groups"] if group["localization"]]
    if not groups:
        return None
    figure, panels = create_panels(len(groups), 3, (4.2, 4.7), (0.6, 0.2), phantom)
    for axes, group in zip(panels, groups, strict=True):
        rules = group["localization"]["all_boxed"]["rules"]
        rule = find_answering_rule(rules) or "half_max"  # without a map: the controls
        maps = rules[rule]
        for index, name in enumerate(name for name in maps if not is_control(name)):
            _plot_accuracy(axes, maps[name], label=name_map(name), marker="osD^v"[index % 5], **style_of(index))
        for name, line in (("median_box", "-"), ("random_map", ":"), ("grid_box", "-.")):
            if name in maps:  # files of older versions lack some
                _plot_accuracy(axes, maps[name], label=name_map(name).split(" of ")[0], color="black", linestyle=line)
        axes.set(xlabel="IoU above", ylabel="share of boxed positives", ylim=(-0.02, 1.02))
        num_images = group["localization"]["all_boxed"]["num_images"][0]
        axes.set_title(f"{group['name']}, n {num_images}\n{RULE_NAMES[rule]}", fontsize=9)
        # Below: everywhere within, some line would be hidden.
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    caption = "Boxes by the rule that answers for each model. The black line saw no image: the others' median box."
    return Picture("overlap", "Overlap with the true boxes", caption, figure)


def _plot_accuracy(axes: Axes, values: dict[str, Any], **style: Any) -> None:
    found = [values[f"accuracy_iou_{threshold:g}"] for threshold in IOU_THRESHOLDS]
    shares = [np.nan if value is None else value["estimate"] for value in found]
    axes.plot(IOU_THRESHOLDS, shares, **style)


def draw_curves(groups: Sequence[Group], phantom: bool) -> Picture | None:
    """Draw training and dev loss, and dev AUROC, of every run; None where no run left its history."""
    runs = [result for group in groups for result in group.results if result.history]
    if not runs:
        return None
    figure = create_figure(12, 4.2, phantom)
    panels = figure.subplots(1, 3)
    for index, result in enumerate(runs):
        epochs = [row["epoch"] for row in result.history]
        for axes, name in zip(panels, ("train_loss", "dev_loss", "dev_auroc"), strict=True):
            values = [row.get(name, math.nan) for row in result.history]
            axes.plot(epochs, values, marker=".", label=result.name, **style_of(index))
            axes.set(xlabel="epoch", ylabel=name.replace("_", " ").replace("auroc", "AUROC"))
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panels[0].legend(fontsize=7)
    caption = "Training loss is class-weighted, dev loss is not. The state of the best monitored dev value was tested."
    return Picture("learning_curves", "Learning curves", caption, figure)
