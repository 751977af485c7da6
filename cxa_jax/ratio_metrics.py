"""What the cardiothoracic ratio says of a test split: one more control, beside the network and together with it."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxa_jax.agreement import describe_agreement
from cxa_jax.cardiothoracic import SOURCE, RatioReader, read_ratios, save_ratio_reader
from cxa_jax.classification import short_interval
from cxa_jax.comparison import paired_bootstrap
from cxa_jax.data.datasets import Split
from cxa_jax.localization import BoxedImages
from cxa_jax.localization_table import ANSWERING, LocalizationTable, find_leading_map
from cxa_jax.predictions import PredictionTable
from cxa_jax.ratio_fit import fit_on_phantoms
from cxa_jax.run import Run
from cxa_jax.scored_maps import THUMBNAIL
from cxa_jax.statistics import bootstrap_interval
from cxa_jax.strata import MIN_PATIENTS, count_patients_by_class, find_strata

log = logging.getLogger(__name__)


def save_ratio(
    run: Run,
    dev: PredictionTable,
    test: PredictionTable,
    output: pathlib.Path,
    boxed: BoxedImages,
    table: LocalizationTable | None,
) -> dict[str, Any] | None:
    """Fit the reader, write it to `output`, and test it; None unless config.eval.cardiothoracic_ratio asks for it.

    The reader is the same for every run and size, so that an older test's stays where none is asked for. Arguments as
    of `measure_ratio`.
    """
    if not run.config.eval.cardiothoracic_ratio:
        return None
    reader = fit_on_phantoms(run.config.data.num_workers)
    save_ratio_reader(reader, output)
    return measure_ratio(run, reader, dev, test, boxed, table)


def measure_ratio(
    run: Run,
    reader: RatioReader,
    dev: PredictionTable,
    test: PredictionTable,
    boxed: BoxedImages,
    table: LocalizationTable | None,
) -> dict[str, Any]:
    """Read the ratios of dev and test and return what metrics.json says of them.

    Args:
        run: what is evaluated.
        reader: fitted on drawings.
        dev: predictions; where its images are not those of the run's dev split, nothing is fitted together.
        test: predictions, in the split's order.
        boxed: the test images with a box.
        table: what the maps' boxes on them are, or None.
    """
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}
    splits = run.dataset.splits
    dev_ratios = None
    if dev.id.tolist() == splits["dev"].index["id"].tolist():
        dev_ratios, _ = _read(reader, splits["dev"])
    else:
        log.info("the ratio is not joined with the network: dev's images are not at this size")
    ratios, edges = _read(reader, splits["test"])
    report = {"source": SOURCE, "reader": reader.facts}
    report |= describe_ratio(test, ratios, dev, dev_ratios, **options)
    return report | {"boxed": _compare_with_boxes(run, edges[boxed.rows], boxed, test, table, **options)}


def _read(reader: RatioReader, split: Split) -> tuple[np.ndarray, np.ndarray]:
    if not len(split.source):
        return np.empty(0), np.empty((0, 6))
    return read_ratios(reader, (split.read_image(row) for row in range(len(split.source))))


def describe_ratio(
    test: PredictionTable,
    ratios: np.ndarray,
    dev: PredictionTable,
    dev_ratios: np.ndarray | None,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compute AUROCs on test of the ratio, the network and both, with differences paired by patient.

    Both: logistic regression on standardised logit and ratio, fitted on dev. An image without a plausible ratio has
    dev's median (test's, where dev has none), and is counted.

    Args:
        test: what is evaluated, with logits.
        ratios: [N], nan where there is none.
        dev: where both are joined.
        dev_ratios: [M] of its images, or None: nothing is joined.
        num_resamples: patient-clustered resamples behind each interval.
        seed: of the resamples.

    Returns:
        `num_unread`; `median_ratio` of either class; `all` and `by_view` (view -> the same; empty where there is one)
        with `num_images`, `num_positives`, `num_patients`, `too_small` (fewer than MIN_PATIENTS of a class: nothing
        else then), intervals `auroc`, `network`, `with_network`, and the paired `less_network` and
        `with_network_less_network`; `ratio_beats_network`; `coefficients` of the standardised logit and ratio.
    """
    known = ratios if dev_ratios is None or not np.isfinite(dev_ratios).any() else dev_ratios
    fill = float(np.nanmedian(known)) if np.isfinite(known).any() else 0.0
    filled = np.where(np.isfinite(ratios), ratios, fill)
    scores, coefficients = {"auroc": filled, "network": test.logit}, None
    if dev_ratios is not None and 0 < dev.label.sum() < len(dev):
        inputs = np.column_stack([dev.logit, np.where(np.isfinite(dev_ratios), dev_ratios, fill)])
        model = make_pipeline(StandardScaler(), LogisticRegression())
        with threadpool_limits(1):
            model.fit(inputs, dev.label)
            scores["with_network"] = model.decision_function(np.column_stack([test.logit, filled]))
        coefficients = dict(zip(("logit", "ratio"), model[-1].coef_[0].tolist(), strict=True))
    options = {"num_resamples": num_resamples, "seed": seed}
    whole = _compare(test, scores, np.ones(len(test), bool), **options)
    views = {
        stratum.name: _compare(test, scores, stratum.mask, **options)
        for stratum in find_strata(test.label, {"view": test.attributes.get("view", np.empty(0, str))})
    }
    views = views if len(views) > 1 else {}  # one says what all say
    return {
        "num_unread": int(np.sum(~np.isfinite(ratios))),
        "median_ratio": {"negative": _median(ratios[test.label == 0]), "positive": _median(ratios[test.label == 1])},
        "all": whole,
        "by_view": views,
        "ratio_beats_network": bool(whole["less_network"]["low"] > 0) if not whole["too_small"] else False,
        "coefficients": coefficients,
    }


def _median(ratios: np.ndarray) -> float | None:
    return float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else None


def _compare(test: PredictionTable, scores: Mapping[str, np.ndarray], mask: np.ndarray, **options: int) -> dict:
    """Return the AUROC of each score on the images of a mask, and what it is above the network's."""
    label, patient = test.label[mask], (test.id if test.patient is None else test.patient)[mask]
    row = {"num_images": len(label), "num_positives": int(label.sum()), "num_patients": len(np.unique(patient))}
    row["too_small"] = min(count_patients_by_class(label, patient)) < MIN_PATIENTS
    if row["too_small"]:
        return row
    row |= {
        name: short_interval(bootstrap_interval(label, of[mask], patient, **options)) for name, of in scores.items()
    }
    network = scores["network"][mask]
    for name, of in scores.items():
        if name != "network":
            paired = paired_bootstrap(label, of[mask], network, patient, **options)
            row[{"auroc": "less_network"}.get(name, f"{name}_less_network")] = short_interval(paired.difference)
    return row


def _compare_with_boxes(
    run: Run,
    edges: np.ndarray,
    boxed: BoxedImages,
    test: PredictionTable,
    table: LocalizationTable | None,
    **options: int,
) -> dict[str, Any] | None:
    """Hold heart widths to those of the true boxes: the regression's, and those of the maps' boxes; None without any.

    A report: nothing is fitted to boxes. Ratios are over the regression's thorax width, that of the true box, too.
    """
    if not len(boxed.rows):
        return None
    size = run.dataset.image_size
    widths = {"regression": edges[:, 5] - edges[:, 4]} | _find_map_widths(table, size)
    true, thorax = boxed.boxes[:, 2] / size, np.maximum(edges[:, 1] - edges[:, 0], 1e-6)
    patients = (test.id if test.patient is None else test.patient)[boxed.rows]
    return {
        name: {
            "heart_width": describe_agreement(width, true, patients, **options),
            "ratio": describe_agreement(width / thorax, true / thorax, patients, **options),
        }
        for name, width in widths.items()
    }


def _find_map_widths(table: LocalizationTable | None, size: int) -> dict[str, np.ndarray]:
    """Return 'map, rule' -> widths of its boxes as shares of the image's: of the leading map, and of the thumbnail."""
    found = {}
    for rule in ANSWERING if table else ():
        names = [name for name, of in table.scores if of == rule]
        for name in dict.fromkeys((find_leading_map(names), THUMBNAIL)):
            if name in names:
                found[f"{name}, {rule}"] = table.scores[name, rule].predicted[:, 2] / size
    return found
