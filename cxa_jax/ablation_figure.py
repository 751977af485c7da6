"""The figure of an ablation: every pooling and stride, every seed, intervals, and what chance gives."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxa_jax.ablation_table import title_control, title_rows
from cxa_jax.figures import save_figure

CONTROL_STYLES = {"random_map": ":", "image_centre": "--", "median_box": "-."}
GREYS = {"stride16": "dimgrey", "stride8": "darkgrey"}  # a random map has the grid of its stride
LEAST_SPAN = 0.1
COLOURS = {"amm": "tab:red", "gap": "tab:blue"}


def save_ablation_figure(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draw a panel for each metric and one for the step time; write `path`.png and .pdf, each all or nothing."""
    names = list(report["poolings"])[::-1]  # the first on top
    metrics = report["metrics"]
    colours = {name: COLOURS.get(own["pooling"], "tab:gray") for name, own in report["poolings"].items()}
    figure = Figure(figsize=(2.8 * (len(metrics) + 1), 0.42 * len(names) + 2.4), layout="constrained")
    data = report["data"]
    figure.suptitle(
        f"{data['description'].split(' [')[0]}, {data['image_size']} px, {data['num_test_images']:,} test images: "
        "dots are seeds, bars the mean over seeds with its 95 % interval"
    )
    panels = figure.subplots(1, len(metrics) + 1, sharey=True)
    for axes, metric in zip(panels, metrics, strict=False):
        for place, name in enumerate(names):
            _draw_interval(axes, place, report["poolings"][name]["metrics"][metric], colours[name])
        _draw_controls(axes, report, metric)
        axes.set_xlabel(metrics[metric])
    for place, name in enumerate(names):
        step = report["poolings"][name]["step_time"]
        if step:
            ratio = step["ratio"]
            _draw_interval(panels[-1], place, ratio | {"per_seed": []}, colours[name])
            panels[-1].set_xlabel(f"step time / {ratio['to']}\n(rounds resampled)")
    titles = title_rows(report["poolings"])
    panels[0].set_yticks(range(len(names)), [titles[name] for name in names])
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    for axes in panels:
        low, high = axes.get_xlim()
        if high - low < LEAST_SPAN:  # else noise in the fourth digit fills a panel
            axes.set_xlim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
        axes.grid(axis="x", alpha=0.3)
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    for suffix in (".png", ".pdf"):
        save_figure(figure, path.with_suffix(suffix))


def _draw_interval(axes, place: int, value: dict[str, Any] | None, colour: str) -> None:
    if value is None or not np.isfinite(value["estimate"]):
        return
    axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
    axes.plot(value["estimate"], place, "|", color=colour, markersize=14, markeredgewidth=2)
    axes.plot(value["per_seed"], [place + 0.18] * len(value["per_seed"]), "o", color=colour, markersize=3, alpha=0.7)


def _draw_controls(axes, report: dict[str, Any], metric: str) -> None:
    for control, values in report["controls"].items():
        value = values.get(metric)
        if value is not None and np.isfinite(value["estimate"]):
            kind, _, stride = control.partition("-")
            style = {"linestyle": CONTROL_STYLES[kind], "linewidth": 1, "color": GREYS.get(stride, "black")}
            axes.axvline(value["estimate"], label=title_control(control), **style)
