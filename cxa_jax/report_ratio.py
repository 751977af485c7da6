"""The cardiothoracic ratio in a report: what its two widths alone say of the class, beside the network."""

from typing import Any

from cxa_jax.report_tables import DASH, Table, describe_difference, format_interval
from cxa_jax.strata import MIN_PATIENTS


def list_ratios(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (run, what metrics.json says of the ratio) of each run that measured it on all of the report's images."""
    left_out = report["data"]["left_out"]
    return [
        (run, ratio)
        for group in report["groups"]
        for run, ratio in zip(group["runs"], group["cardiothoracic_ratio"], strict=True)
        if ratio and run not in left_out
    ]


def tabulate_ratio(report: dict[str, Any]) -> Table | None:
    """Return AUROC of the ratio, of the network and of both, all together and by view; None where none was measured."""
    rows, note = [], ""
    for run, ratio in list_ratios(report):
        error = ratio["reader"]["error"]["natural"]["ratio"]
        note = (
            f"Heart's widest over thorax' widest inner width, by {ratio['source']}. On other drawings its mean "
            f"absolute error is {format_interval(error['mean_absolute_error'])}, its correlation "
            f"{format_interval(error['correlation'])}. Both: logistic regression on logit and ratio, fitted on dev. "
            "Differences are paired by patient."
        )
        for name, row in ({"all": ratio["all"]} | ratio["by_view"]).items():
            counts = [f"{row['num_images']:,}", f"{row['num_positives']:,}"]
            cells = [f"too small (under {MIN_PATIENTS} patients of a class)", *[DASH] * 5]
            if not row["too_small"]:
                keys = ("auroc", "network", "less_network", "with_network", "with_network_less_network")
                cells = [format_interval(row.get(key)) for key in keys]
                cells.append(describe_difference(row["less_network"]))
            rows.append([run, name, *counts, *cells])
    head = ["run", "view", "images", "positive", "AUROC of the ratio", "of the network", "ratio less network"]
    head += ["of both", "both less network", "the ratio is"]
    return Table("The cardiothoracic ratio as a control", head, rows, note) if rows else None


def write_ratio_lines(report: dict[str, Any]) -> list[str]:
    """Return lines for the first screen: the ratio's AUROC, and whether it beats the network."""
    lines = []
    for run, ratio in list_ratios(report)[:1]:
        row = ratio["all"]
        if not row["too_small"]:
            gain = format_interval(row["less_network"]) + ("; IT BEATS THE NETWORK" * ratio["ratio_beats_network"])
            lines.append(
                "cardiothoracic ratio by regressions fitted on drawings, same images: "
                f"{format_interval(row['auroc'])}, less the network of {run} {gain}"
            )
    return lines
