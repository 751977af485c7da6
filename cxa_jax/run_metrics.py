"""Every number of one run: what metrics.json holds. The protocol stands beside each number."""

import dataclasses
import logging
from typing import Any

import numpy as np

from cxa_jax.classification import describe_classification
from cxa_jax.comparison import paired_bootstrap
from cxa_jax.data.datasets import Split, shared_patients
from cxa_jax.errors import UserError
from cxa_jax.localization_table import summarize_tables
from cxa_jax.map_evaluation import PROTOCOL, THRESHOLD_FREE_PROTOCOL, Localization, describe_threshold_free
from cxa_jax.predictions import PredictionTable
from cxa_jax.run import Run
from cxa_jax.statistics import bootstrap_interval
from cxa_jax.thumbnail import compute_thumbnail_features, fit_thumbnail_baseline

log = logging.getLogger(__name__)


def compute_run_metrics(
    run: Run,
    dev: PredictionTable,
    test: PredictionTable,
    boxes: Localization | None,
    dev_name: str = "dev",
    ratio: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute every number of a run: classification on dev and test, localisation beside its controls, a baseline.

    The second threshold maximises Youden's J on dev, and dev fits the calibration; nothing is chosen on test. `ratio`
    is what `ratio_metrics.measure_ratio` says, None where it was not asked for.
    """
    protocol = {"dev_name": dev_name, "prevalences": run.config.eval.prevalences}
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}
    return {
        "data": run.dataset.name,
        "phantom": run.dataset.is_phantom,
        "views": run.dataset.views,
        "image_size": run.dataset.image_size,
        "normalization": run.normalization,
        "fingerprint": run.dataset.fingerprint,
        "train": {
            "num_images": len(run.dataset.splits["train"].index["label"]),
            "num_positives": int(run.dataset.splits["train"].index["label"].sum()),
            "patients_shared": {"/".join(pair): count for pair, count in shared_patients(run.dataset).items()},
        },
        "dev": describe_classification(dev, dev, **options, **protocol),
        "test": describe_classification(test, dev, **options, **protocol),
        "localization": describe_localization(run, boxes, **options),
        "thumbnail_baseline": describe_thumbnail_baseline(run, test, run.dataset.splits["test"]),
        "cardiothoracic_ratio": ratio,
    }


def describe_localization(
    run: Run, found: Localization | None, *, num_resamples: int, seed: int
) -> dict[str, Any] | None:
    """Return the localisation scores with their protocol; None without any box."""
    if found is None:
        return None
    boxes = found.table
    geometry = {"stride_px": run.model.backbone.stride, "offset_px": run.model.backbone.offset}
    return {
        "protocol": PROTOCOL,
        "tuned_rules": found.rules and found.rules.describe(),
        "geometry": geometry | {"image_size_px": run.dataset.image_size},
        "num_images": len(boxes.ids),
        "num_patients": len(np.unique(boxes.patients)),
        "num_predicted_positive": int(boxes.predicted_positive.sum()),
        "threshold_free": {"protocol": THRESHOLD_FREE_PROTOCOL, "maps": describe_threshold_free(found.threshold_free)},
    } | summarize_tables([boxes], num_resamples=num_resamples, seed=seed)


def describe_thumbnail_baseline(run: Run, test: PredictionTable, split: Split) -> dict[str, Any] | None:
    """Return the test AUROC of logistic regression on 8x8 thumbnails, fitted to the same training images.

    `gain` is the network's AUROC less that, of the same images, paired by patient.
    """
    train = run.dataset.splits["train"]
    try:
        features = _read_thumbnails(train)
        model = fit_thumbnail_baseline(features, train.index["label"], train.index["patient"])
    except UserError as error:
        log.warning("no thumbnail baseline: %s", error)
        return None
    scores = model.predict_proba(_read_thumbnails(split))[:, 1]
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}
    interval = bootstrap_interval(test.label, scores, test.patient, **options)
    gain = paired_bootstrap(test.label, test.score, scores, test.patient, **options).difference
    return {
        "auroc": dataclasses.asdict(interval),
        "gain": dataclasses.asdict(gain),
        "num_train_images": len(features),
    }


def _read_thumbnails(split: Split) -> np.ndarray:
    images = (split.read_image(row) for row in range(len(split.source)))
    return np.concatenate([compute_thumbnail_features(image[None]) for image in images])
