"""Which reader of the cardiothoracic ratio errs least on phantoms: thumbnails, projections, a cascade, or maps' boxes?

    python benchmarks/cardiothoracic.py [--workdir=runs/dense121-phantom_hour]

Every estimator is fitted on the same 1,600 drawings, chosen by the first held-out population and reported on a second
one. With --workdir, a tested phantom run, the widths of its maps' boxes on its boxed test images stand beside the
chosen reader on the same images, over the thorax width that this reads; the truth is measured on the masks.

Writes benchmarks/results/cardiothoracic.json and .md.
"""

import argparse
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from cxa_jax.agreement import describe_agreement  # noqa: E402
from cxa_jax.cardiothoracic import (  # noqa: E402
    NUM_STEPS,
    compute_ratios,
    fit_ratio_reader,
    flatten_contrast,
    read_edges,
)
from cxa_jax.data.phantom import PhantomSpec  # noqa: E402
from cxa_jax.data.phantom_ratio import draw_measured  # noqa: E402
from cxa_jax.localization_table import ANSWERING, find_leading_map, read_localization  # noqa: E402
from cxa_jax.ratio_fit import FIT_SEED, HELD_OUT, HELD_OUT_SEED, NUM_FITTED, draw_chests, fit_on_phantoms  # noqa: E402
from cxa_jax.results import load_results  # noqa: E402
from cxa_jax.ridge import apply_ridge, fit_ridge  # noqa: E402
from cxa_jax.scored_maps import THUMBNAIL  # noqa: E402
from cxa_jax.thumbnail import compute_thumbnail_features  # noqa: E402
from cxa_jax.workdir import describe_environment, to_json, write_atomically  # noqa: E402

CHOICE_SEED = 4_003
NUM_IMAGES = 300  # of each population
GRID = (16, 16)
THUMBNAIL_ALPHA = 10.0
OPTIONS = {"num_resamples": 1000, "seed": 0}


def read_projections(images: np.ndarray) -> np.ndarray:
    """Read EDGES off column profiles, nothing fitted: the lungs are the two valleys, half way up are the edges.

    The thorax' profile is the mean of rows 35 to 60 % from the top, the heart's that of rows 50 to 68 %; grey levels
    are ranks.
    """
    found = np.full((len(images), 6), np.nan)
    for row, image in enumerate(images[..., 0]):
        height, width = image.shape
        ranks = np.argsort(np.argsort(image.ravel(), kind="stable")).reshape(image.shape) / image.size
        upper, lower = (ranks[int(a * height) : int(b * height)].mean(axis=0) for a, b in ((0.35, 0.6), (0.5, 0.68)))
        left = int(0.1 * width) + int(np.argmin(upper[int(0.1 * width) : int(0.45 * width)]))
        right = int(0.55 * width) + int(np.argmin(upper[int(0.55 * width) : int(0.9 * width)]))
        middle = width // 2
        edges = [_climb(upper, left, 0), _climb(upper, right, width - 1) + 1]
        found[row, [0, 1]] = np.array(edges) / width
        found[row, [4, 5]] = np.array([_climb(lower, left, middle), _climb(lower, right, middle) + 1]) / width
    return found


def _climb(profile: np.ndarray, valley: int, end: int) -> int:
    """Return where a profile first is half way from its valley to its highest point on the way to `end`."""
    way = np.arange(valley, end + np.sign(end - valley), np.sign(end - valley))
    half = (profile[valley] + profile[way].max()) / 2
    return int(way[np.argmax(profile[way] >= half)])


def make_estimators() -> dict[str, Any]:
    """Return estimator -> function from images to EDGES, those that are fitted on the same drawings."""
    half = NUM_FITTED // 2
    parts = [draw_chests("natural", FIT_SEED, range(half), False, 0)]
    parts.append(draw_chests("natural", FIT_SEED, range(half, NUM_FITTED), True, 0))
    images, edges = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.random.default_rng(FIT_SEED).permutation(len(images))
    images, edges = images[order], edges[order]
    estimators = {"projections of grey levels, nothing fitted": read_projections}

    def add_thumbnail(name, describe):
        fit = fit_ridge(describe(images), edges, [THUMBNAIL_ALPHA])[0]
        estimators[name] = lambda others: apply_ridge(describe(others), *fit)

    add_thumbnail("ridge on 16x16 thumbnail", _standardize)
    add_thumbnail("ridge on 16x16 thumbnail, contrast flattened", _flatten)
    for steps in (1, 2, 3, 5):
        reader = fit_ratio_reader(images, edges, steps)
        estimators[f"cascade, {steps} step{'s' * (steps > 1)}"] = lambda others, reader=reader: read_edges(
            reader, others
        )
    return estimators


def _standardize(images: np.ndarray) -> np.ndarray:
    cells = compute_thumbnail_features(images, GRID)
    return (cells - cells.mean(axis=1, keepdims=True)) / cells.std(axis=1, keepdims=True)


def _flatten(images: np.ndarray) -> np.ndarray:
    frames = np.stack([flatten_contrast(image) for image in images])
    size = frames.shape[1] // GRID[0]
    return frames.reshape(len(frames), GRID[0], size, GRID[1], size).mean(axis=(2, 4)).reshape(len(frames), -1)


def compare_estimators() -> list[dict[str, Any]]:
    """Return one row for each estimator and population: agreement of its ratio and thorax width with the masks'."""
    rows, estimators = [], make_estimators()
    for seed, use in ((CHOICE_SEED, "choice"), (HELD_OUT_SEED, "report")):
        for population, (preset, posed) in HELD_OUT.items():
            images, edges = draw_chests(preset, seed, range(NUM_IMAGES), posed, 0)
            for name, estimate in estimators.items():
                found = estimate(images)
                rows.append(
                    {
                        "estimator": name,
                        "population": population,
                        "use": use,
                        "ratio": describe_agreement(compute_ratios(found), compute_ratios(edges), None, **OPTIONS),
                        "thorax_width": describe_agreement(
                            *(e[:, 1] - e[:, 0] for e in (found, edges)), None, **OPTIONS
                        ),
                    }
                )
    return rows


def compare_maps(workdir: str) -> list[dict[str, Any]]:
    """Return one row for each way to the heart's width on a phantom run's boxed test images, drawn again."""
    result = load_results([workdir])[0]
    table, config = read_localization(pathlib.Path(workdir) / "localization_test.csv"), result.config
    size, phantom = (
        config["data.image_size"],
        {k: config[f"data.phantom.{k}"] for k in ("preset", "prevalence", "seed")},
    )
    spec = PhantomSpec(phantom["preset"], phantom["prevalence"], 0.0, phantom["seed"])
    first = np.array([name.endswith("_0") for name in table.ids])  # `draw_measured` draws a patient's first image
    drawn = [draw_measured((spec, size, int(name[7:13]), False)) for name in table.ids[first]]
    images, edges = np.stack([image for image, _ in drawn])[..., None], np.stack([row for _, row in drawn])
    found = read_edges(fit_on_phantoms(0), images)
    widths = {f"cascade, {NUM_STEPS} steps": found[:, 5] - found[:, 4]}
    for rule in ANSWERING:
        names = [name for name, of in table.scores if of == rule]
        for name in dict.fromkeys((find_leading_map(names), THUMBNAIL)):
            if name in names:
                widths[f"box of {name}, {rule}"] = table.scores[name, rule].predicted[first, 2] / size
    thorax, true = found[:, 1] - found[:, 0], compute_ratios(edges)
    return [
        {"estimator": name, "ratio": describe_agreement(width / thorax, true, table.patients[first], **OPTIONS)}
        for name, width in widths.items()
    ]


def write_results(rows: list[dict[str, Any]], maps: list[dict[str, Any]]) -> None:
    """Write the JSON and the table."""
    folder = ROOT / "benchmarks" / "results"
    facts = {"estimators": rows, "maps": maps, "environment": describe_environment()}
    write_atomically(folder / "cardiothoracic.json", to_json(facts))
    head = "| estimator | images | mean absolute error | bias | sd | limits of agreement | correlation |\n" + 7 * "|---"
    lines = ["# The cardiothoracic ratio on phantoms", "", "Error of the ratio, held-out drawings.", ""]
    for population in HELD_OUT:
        lines += [f"## {population}", "", head + "|"]
        lines += [_format_row(row) for row in rows if (row["population"], row["use"]) == (population, "report")] + [""]
    if maps:
        lines += ["## Boxed test images of a phantom run", "", head + "|", *map(_format_row, maps), ""]
    write_atomically(folder / "cardiothoracic.md", "\n".join(lines))


def _format_row(row: dict[str, Any]) -> str:
    values = row["ratio"]
    cells = {k: "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**v) for k, v in values.items() if isinstance(v, dict)}
    limits = "{:.3f} to {:.3f}".format(*(values[name]["estimate"] for name in ("limit_low", "limit_high")))
    shown = (cells["mean_absolute_error"], cells["bias"], cells["sd"], limits, cells["correlation"])
    return f"| {row['estimator']} | {values['num_images']} | {' | '.join(shown)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", help="of a tested phantom run")
    workdir = parser.parse_args().workdir
    write_results(compare_estimators(), compare_maps(workdir) if workdir else [])
