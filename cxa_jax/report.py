"""--mode=report: any set of finished runs, and anyone's predictions, as one page, one JSON file and the figures."""

import logging
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from cxa_jax import report_figures, report_pictures, report_tables
from cxa_jax.atomic_files import replace_when_written
from cxa_jax.classification import describe_counts
from cxa_jax.figures import save_figure
from cxa_jax.report_cards import write_cards
from cxa_jax.report_figures import Picture
from cxa_jax.report_localization import tabulate_localization
from cxa_jax.report_numbers import (
    Group,
    choose_num_resamples,
    compare_all,
    compute_group,
    describe_group,
    group_results,
)
from cxa_jax.report_page import Section, ShownPicture, embed_picture, render_page
from cxa_jax.report_ratio import tabulate_ratio
from cxa_jax.report_runs import tabulate_runs
from cxa_jax.results import Result, load_results
from cxa_jax.workdir import describe_environment, open_workdir, to_json, write_atomically

log = logging.getLogger(__name__)

SEED = 0  # of the resamples
PIXELS_PER_INCH = 80  # of a figure on the page


def write_report(workdirs: Sequence[str], workdir: str) -> dict[str, Any]:
    """Write report.html, report.json and figures/ (PNG and PDF) of finished runs to `workdir`.

    Args:
      workdirs: folders of runs, and CSV files with id, label, score and optionally patient; all on the same images.
      workdir: where the report goes.

    Returns:
      What was written to report.json.

    Raises:
      UserError: see `results.load_results`; the message names the run and the cure.
    """
    results = load_results(workdirs)
    with open_workdir(workdir) as folder:
        return _write_report(results, folder)


def _write_report(results: Sequence[Result], folder: pathlib.Path) -> dict[str, Any]:
    num_resamples = choose_num_resamples(results)
    groups = [compute_group(group, num_resamples, SEED) for group in group_results(results)]
    report = compute_report(results, groups, num_resamples)
    pictures = save_pictures(folder / "figures", draw_pictures(groups, report))
    pictures |= copy_augmentation(folder / "figures", results)
    write_atomically(folder / "report.json", to_json(report))
    page = render_page(report, write_cards(report), arrange(report, results, pictures))
    write_atomically(folder / "report.html", page)
    log.info("report of %d run(s): %s", len(results), folder / "report.html")
    return report


def compute_report(results: Sequence[Result], groups: Sequence[Group], num_resamples: int) -> dict[str, Any]:
    """Return what report.json holds: data, protocol, groups, comparisons, baselines, runs."""
    data = describe_counts(results[0].test)
    data["left_out"] = {result.name: result.num_left_out for result in results if result.num_left_out}
    baselines = [
        result.metrics["thumbnail_baseline"]
        for result in results
        if result.metrics and result.metrics["thumbnail_baseline"] and not result.num_left_out  # else of other images
    ]
    return {
        "phantom": results[0].is_phantom,
        "data": data,
        "protocol": {
            "intervals": f"{data['interval_method']}, {num_resamples:,} resamples; several runs: the mean over runs, "
            "with the variance between seeds added. Thresholds and calibration are chosen on dev, none on test; "
            "sensitivity at a specificity is read off test's own ROC.",
            "num_resamples": num_resamples,
            "seed": SEED,
        },
        "groups": [describe_group(group, num_resamples, SEED) for group in groups],
        "comparisons": compare_all(groups),
        "baselines": baselines[:1],  # fitted to the same training images by every run
        "runs": [describe_run(result) for result in results],
        "environment": describe_environment(),
    }


def describe_run(result: Result) -> dict[str, Any]:
    """Return where a run's numbers come from."""
    described = {"name": result.name, "path": str(result.path)}
    if not result.metrics:
        return described | {"kind": "predictions file"}
    kept = ("data", "image_size", "normalization", "fingerprint", "train", "checkpoint", "config", "environment")
    return described | {"kind": "run"} | {name: result.metrics[name] for name in kept}


def draw_pictures(groups: Sequence[Group], report: dict[str, Any]) -> list[Picture]:
    """Draw every figure that the runs allow."""
    phantom = report["phantom"]
    intensity = next((r.config["eval.overlay_intensity"] for g in groups for r in g.results if r.config), 0.2)
    pictures = [
        report_figures.draw_roc(groups, phantom, SEED),
        report_figures.draw_confusion(report, phantom),
        report_figures.draw_reliability(report, phantom),
        report_figures.draw_strata(report, phantom),
        report_figures.draw_overlap(report, phantom),
        report_figures.draw_curves(groups, phantom),
        *report_pictures.draw_attention(groups, phantom, intensity),
        report_pictures.draw_pairs(groups, phantom),
        *(report_pictures.draw_worst(group, phantom) for group in groups),
        *(sheet for group in groups for sheet in report_pictures.draw_contact_sheets(group, phantom)),
    ]
    return [picture for picture in pictures if picture is not None]


def save_pictures(folder: pathlib.Path, pictures: Sequence[Picture]) -> dict[str, ShownPicture]:
    """Write each figure as PNG and PDF, and return them as the page shows them."""
    folder.mkdir(exist_ok=True)
    shown = {}
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        save_figure(picture.figure, path)
        save_figure(picture.figure, path.with_suffix(".pdf"))
        width = round(picture.figure.get_figwidth() * PIXELS_PER_INCH)
        shown[picture.name] = embed_picture(path, picture.name, picture.title, picture.caption, width)
    return shown


def copy_augmentation(folder: pathlib.Path, results: Sequence[Result]) -> dict[str, ShownPicture]:
    """Copy the first run's augmented training images (Fig. 3), drawn when it was trained."""
    result = next((result for result in results if result.augmentation), None)
    if result is None:
        return {}
    name = "fig3_augmentation"
    for end in (".png", ".pdf"):
        source = result.augmentation.with_suffix(end)
        if source.is_file():
            with replace_when_written(folder / f"{name}{end}") as neighbour:
                shutil.copyfile(source, neighbour)
    caption = f"The first training batch of {result.name} as its network saw it; 1 = cardiomegaly."
    title = "Fig. 3: augmented training images"
    return {name: embed_picture(folder / f"{name}.png", name, title, caption, 560)}


def arrange(report: dict[str, Any], results: Sequence[Result], pictures: dict[str, ShownPicture]) -> list[Section]:
    """Put tables and figures into the page's sections."""

    def named(*starts: str) -> list[ShownPicture]:
        return [picture for name, picture in pictures.items() if name.startswith(starts)]

    paper = [
        report_tables.tabulate_paper(report, report_tables.TABLE_5_METRICS, "Table 5: averages and AUROC"),
        report_tables.tabulate_paper(report, report_tables.TABLE_4_METRICS, "Table 4: by class"),
        report_tables.tabulate_feasibility(),
    ]
    sections = {
        "Classification": [
            report_tables.tabulate_overview(report),
            report_tables.tabulate_comparisons(report),
            tabulate_ratio(report),
            *named("fig6"),
            report_tables.tabulate_points(report),
            report_tables.tabulate_prevalence(report),
            *named("fig5"),
            report_tables.tabulate_confusion(report),
        ],
        "Beside the paper": paper,
        "Strata": [*named("strata"), report_tables.tabulate_strata(report)],
        "Calibration": [*named("reliability"), report_tables.tabulate_calibration(report)],
        "Localisation": [*tabulate_localization(report), *named("overlap", "boxes")],
        "Maps": named("fig7", "fig8", "fig9"),
        "Worst errors": named("worst"),
        "Training": [*named("learning", "fig3"), *tabulate_runs(report)],
    }
    basis = describe_basis(report)
    return [
        Section(title, [item for item in items if item is not None], "" if title == "Training" else basis)
        for title, items in sections.items()
    ]


def describe_basis(report: dict[str, Any]) -> str:
    """Return what every number of a section rests on, unless its table says otherwise."""
    data = report["data"]
    return (
        f"{data['num_images']:,} test images, {data['num_positives']:,} positive; {data['num_patients']:,} patients, "
        f"{data['num_positive_patients']:,} with a positive image. In brackets: {data['interval_method']}, "
        f"{report['protocol']['num_resamples']:,} resamples."
    )
