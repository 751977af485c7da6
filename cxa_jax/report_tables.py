"""A report's numbers as tables of text: what a reader sees, each with its protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cxa_jax.paper_tables import find_paper_intervals, is_official_test_set, judge
from cxa_jax.prevalence import (
    NUM_TEST_NEGATIVES,
    NUM_TEST_POSITIVES,
    TABLE_4,
    compute_implied_prevalence,
    find_feasible_confusion_matrices,
)
from cxa_jax.strata import MIN_PATIENTS

DASH = "-"
TABLE_5_METRICS = ("precision_weighted", "recall_weighted", "f1_weighted", "auroc")
TABLE_4_METRICS = (
    "precision_negative", "recall_negative", "f1_negative", "precision", "recall", "f1",
    "precision_weighted", "recall_weighted", "f1_weighted", "accuracy",
)  # fmt: skip
POINT_METRICS = ("accuracy", "precision", "recall", "specificity", "npv", "f1", "f1_weighted")


@dataclass(frozen=True)
class Table:
    """Cells as text; `note` is the protocol below, `folded` shows the table on demand."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False


def format_number(value: float | None, digits: int = 3) -> str:
    """Return '0.123', or a dash for what is undefined."""
    return DASH if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def format_interval(interval: dict[str, float] | None, digits: int = 3) -> str:
    """Return '0.123 [0.1, 0.2]', or a dash for what is undefined."""
    if interval is None or interval["estimate"] is None or not math.isfinite(interval["estimate"]):
        return DASH
    low, high = (format_number(interval[end], digits) for end in ("low", "high"))
    return f"{format_number(interval['estimate'], digits)} [{low}, {high}]"


def format_p(value: float | None) -> str:
    """Return a p-value, '< 0.001' for small ones."""
    return DASH if value is None or not math.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("auroc", "AUROC")


def tabulate_overview(report: dict[str, Any]) -> Table:
    """Return the threshold-free metrics of each model."""
    names = [name for name in report["groups"][0]["free"]]
    head = ["model", "runs", *(_plain(name) for name in names), "AUROC of each run", "sd over seeds"]
    rows = []
    for group in report["groups"]:
        auroc = group["free"]["auroc"]
        each = ", ".join(format_number(value) for value in auroc["values"])
        cells = [format_interval(group["free"][name]) for name in names]
        rows.append([group["name"], str(len(group["runs"])), *cells, each, format_number(auroc["sd_over_seeds"])])
    note = report["protocol"]["intervals"] + " A dash: not defined, in one of the runs at least."
    return Table("All models, without a threshold", head, rows, note)


def tabulate_comparisons(report: dict[str, Any]) -> Table | None:
    """Return the paired differences in AUROC; None for one model."""
    if not report["comparisons"]:
        return None
    rows = []
    for pair in report["comparisons"]:
        bootstrap, delong = pair["bootstrap"], pair["delong"]
        rows.append(
            [
                f"{pair['a']} - {pair['b']}",
                format_interval(bootstrap),
                format_p(bootstrap["p_value"]),
                format_interval(delong) if delong else DASH,
                format_p(delong["p_value"]) if delong else DASH,
                describe_difference(bootstrap),
            ]
        )
    head = ["difference in AUROC", "patients resampled", "p", "DeLong", "p", "says"]
    note = (
        "Paired on the same images. DeLong takes images for independent, which those of a patient are not; "
        "of several seeds it compares the mean scores. With several seeds the other interval holds their variance "
        "(Welch and Satterthwaite's t); of a model with one run it is not known. p-values are not corrected for the "
        "number of pairs."
    )
    return Table("Differences between models", head, rows, note)


def describe_difference(interval: dict[str, float]) -> str:
    """Return what the interval of a difference shows."""
    if interval["low"] is None or not math.isfinite(interval["low"]):
        return "undefined"
    return "higher" if interval["low"] > 0 else "lower" if interval["high"] < 0 else "no difference shown"


def tabulate_paper(report: dict[str, Any], metrics: Sequence[str], title: str) -> Table | None:
    """Set our values beside the printed ones; None where the paper has none of the models."""
    data, rows = report["data"], []
    comparable = not report["phantom"] and is_official_test_set(data["num_images"], data["num_positives"])
    reason = "phantoms" if report["phantom"] else f"{data['num_images']:,} of 10,930 test images"
    for group in report["groups"]:
        printed = find_paper_intervals(group["name"].split(" ")[0])
        for metric in metrics:
            if metric not in printed or (title.startswith("Table 4") and group["name"].split(" ")[0] not in TABLE_4):
                continue
            value, low, high = printed[metric]
            own = group["free"]["auroc"] if metric == "auroc" else group["at_0.5"][metric]
            like = own["estimate"] if metric == "auroc" else mean_paper_like(group, metric)
            verdict = judge(like, low, high) if comparable else f"not comparable ({reason})"
            limits = f"[{format_number(low)}, {format_number(high)}]" if math.isfinite(low) else DASH
            like_text = DASH if metric == "auroc" else format_number(like)
            cells = [format_interval(own), like_text, format_number(value, 2), limits, verdict]
            rows.append([group["name"], _plain(metric), *cells])
    head = ["model", "metric", "ours, true prevalence", "ours, paper-like 1:4", "paper", "paper's interval", "ours is"]
    note = (
        "Threshold 0.5. The paper's rows imply 20 % positives, which its stated test set (1,069 of 10,930) does not "
        "have: precision, recall, F1 and accuracy are compared paper-like, as the mean over 200 seeded 1:4 subsamples. "
        "The paper prints no intervals: AUROC's is Hanley and McNeil's for the stated test set; the others' are "
        "binomial at the printed recalls on a 1:4 subsample, and none follows for the GAP models."
    )
    return Table(title, head, rows, note) if rows else None


def tabulate_feasibility() -> Table:
    """Return for each row of Table 4 how many confusion matrices of the stated test set, and of 1:4, print alike."""
    rows = []
    for name, row in TABLE_4.items():
        precision, recall, _ = row.positive
        stated, fifth = (
            len(find_feasible_confusion_matrices(row, negatives, NUM_TEST_POSITIVES))
            for negatives in (NUM_TEST_NEGATIVES, 4 * NUM_TEST_POSITIVES)
        )
        implied = compute_implied_prevalence(precision, recall, 1 - row.negative[1])
        rows.append([name, *(f"{value:.2f}" for value in row.positive), f"{stated:,}", f"{fifth:,}", f"{implied:.1%}"])
    head = ["paper's model", "precision", "recall", "F1", "fit 9,861 + 1,069", "fit 4,276 + 1,069", "implied positives"]
    note = (
        "Integer confusion matrices whose precision, recall and F1 of both classes round to the printed ones, on the "
        "stated test set and on its positives with four negatives each; positives that the printed values imply."
    )
    return Table("Can Table 4 come from the stated test set?", head, rows, note, folded=True)


def mean_paper_like(group: dict[str, Any], metric: str, section: str = "at_0.5") -> float:
    """Return the mean over runs of the mean over 1:4 subsamples; nan where undefined."""
    values = [run[section] and run[section]["paper_like"] for run in group["per_run"]]
    numbers = [value[metric]["mean"] if value and value[metric]["mean"] is not None else math.nan for value in values]
    return sum(numbers) / len(numbers)


def tabulate_confusion(report: dict[str, Any]) -> Table:
    """Return every run's confusion matrix at both thresholds, in the cells of Table 1."""
    rows = []
    for group in report["groups"]:
        for run, numbers in zip(group["runs"], group["per_run"], strict=True):
            for section in ("at_0.5", "at_dev_threshold"):
                point = numbers[section]
                if point:
                    (tn, fp), (fn, tp) = point["confusion_matrix"]
                    cells = [format_number(point["threshold"]), point["source"], *(f"{n:,}" for n in (tn, fp, fn, tp))]
                    rows.append([group["name"], run, *cells])
    head = ["model", "run", "threshold", "from", "TN", "FP", "FN", "TP"]
    return Table("Table 1: confusion matrices, rows true, columns predicted: [[TN, FP], [FN, TP]]", head, rows)


def tabulate_points(report: dict[str, Any]) -> Table:
    """Return the metrics of each model at both thresholds."""
    rows = []
    for group in report["groups"]:
        for section, source in (("at_0.5", "fixed"), ("at_dev_threshold", "dev, Youden")):
            if section in group:
                thresholds = ", ".join(format_number(value) for value in group["thresholds"][section])
                cells = [format_interval(group[section][name]) for name in POINT_METRICS]
                rows.append([group["name"], f"{thresholds} ({source})", *cells])
    note = "At the test set's own prevalence; a mean over runs, each at its own threshold. Nothing is chosen on test."
    return Table("At a threshold", ["model", "threshold", *(_plain(name) for name in POINT_METRICS)], rows, note)


def tabulate_prevalence(report: dict[str, Any]) -> Table:
    """Return what depends on the prevalence, at several of them."""
    names, rows = ("precision", "npv", "f1", "accuracy"), []
    for group in report["groups"]:
        run, name = group["per_run"][0], group["runs"][0]
        for section in ("at_0.5", "at_dev_threshold"):
            point = run[section]
            if not point:
                continue
            for prevalence, values in point["at_prevalence"].items():
                cells = [format_interval(values[metric]) for metric in names]
                rows.append([name, format_number(point["threshold"]), f"{float(prevalence):.2%}", *cells])
            if point["paper_like"]:
                like = point["paper_like"]
                cells = [f"{format_number(like[m]['mean'])} (sd {format_number(like[m]['sd'])})" for m in names]
                rows.append([name, format_number(point["threshold"]), "paper-like 1:4", *cells])
    note = (
        "By re-weighting the classes, which leaves TPR, FPR and AUROC as they are: 3.27 % is the official training "
        "list, 9.78 % the test list, 20 % what Table 4 implies. Paper-like: 200 seeded subsamples, sd of the draw "
        "alone. First run of each model."
    )
    head = ["run", "threshold", "prevalence", *(_plain(name) for name in names)]
    return Table("At other prevalences", head, rows, note, folded=True)


def tabulate_calibration(report: dict[str, Any]) -> Table | None:
    """Return calibration before and after temperature and Platt scaling; None where nothing could be fitted."""
    rows = []
    for group in report["groups"]:
        for run, numbers in zip(group["runs"], group["per_run"], strict=True):
            fits = numbers["calibration"]
            for name in ("before", "temperature", "platt") if fits else ():
                values = fits[name]
                shape = f"{values['scale']:.3g} z {values['bias']:+.3g}" if "scale" in values else "z"
                cells = [format_interval(values[key]) for key in ("calibration_error", "brier_score", "log_loss")]
                rows.append([group["name"], run, name, shape, fits["fitted_on"] if "scale" in values else DASH, *cells])
    note = (
        "Measured on test. A fit holds for dev's prevalence; where test's is another, Platt scaling can make it worse. "
        "Calibration error: 15 bins of equal width; noise in the bins makes it too large, and its interval reaches "
        "down by as much as that can be."
    )
    head = ["model", "run", "scaling", "logit becomes", "fitted on", "calibration error", "Brier", "log loss"]
    return Table("Calibration", head, rows, note) if rows else None


def tabulate_strata(report: dict[str, Any]) -> Table | None:
    """Return AUROC, sensitivity and specificity by stratum; None without attributes."""
    rows = []
    for group in report["groups"]:
        for row in group["strata"]:
            counts = [
                f"{row['num_images']:,}",
                f"{row['num_positives']:,}",
                f"{row['num_negative_patients']:,} + {row['num_positive_patients']:,}",
            ]
            small = f"too small (under {MIN_PATIENTS} patients of a class)"
            shown = [small, "", ""] if row["too_small"] else [format_interval(row[k]) for k in _STRATUM_METRICS]
            rows.append(
                [group["name"], f"{row['by']}: {row['name']}", *counts, *shown, format_number(row["threshold"])]
            )
    note = (
        "Sensitivity and specificity at the threshold in the last column (dev's; 0.5 where there is none). "
        "By 'positives', the negatives are all negatives. Several runs: means, with the variance between seeds in the "
        "interval."
    )
    head = ["model", "stratum", "images", "positive", "patients - / +", "AUROC", "sensitivity", "specificity", "at"]
    return Table("Strata", head, rows, note) if rows else None


_STRATUM_METRICS = ("auroc", "recall", "specificity")
