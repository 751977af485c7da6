"""From predictions to numbers: metrics.json and the closing summary. The protocol stands beside each number."""

import dataclasses
import logging
from typing import Any

import numpy as np

from cxa_jax.data.datasets import Split
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions
from cxa_jax.localization import LocalizationScores, score_controls, score_maps, summarize
from cxa_jax.metrics import compute_metrics, compute_youden_threshold
from cxa_jax.run import Run
from cxa_jax.statistics import bootstrap_interval
from cxa_jax.thumbnail import compute_thumbnail_features, fit_thumbnail_baseline

log = logging.getLogger(__name__)

RULE = "half_max"
FIXED_THRESHOLD = 0.5


def compute_report(run: Run, dev: Predictions, test: Predictions) -> dict[str, Any]:
    """Compute every number of a run: AUROC with interval, tables at 0.5 and at dev's threshold, localisation, baseline.

    The second threshold maximises Youden's J on dev; nothing is chosen on test.
    """
    threshold = compute_youden_threshold(dev.label, dev.score)
    return {
        "data": run.dataset.name,
        "phantom": run.dataset.is_phantom,
        "image_size": run.dataset.image_size,
        "normalization": run.normalization,
        "fingerprint": run.dataset.fingerprint,
        "dev": describe_split(run, dev, threshold),
        "test": describe_split(run, test, threshold),
        "localization": describe_localization(run, test, threshold),
        "thumbnail_baseline": describe_thumbnail_baseline(run, test),
    }


def describe_split(run: Run, predictions: Predictions, threshold: float) -> dict[str, Any]:
    """Return counts, AUROC with its patient-clustered interval, and the Table 4 row at both thresholds."""
    label, score, patient = predictions.label, predictions.score, predictions.index["patient"]
    summary = {"num_images": len(label), "num_positives": int(label.sum()), "num_patients": len(np.unique(patient))}
    interval = bootstrap_interval(
        label, score, patient, num_resamples=run.config.eval.num_bootstrap, seed=run.config.seed
    )
    summary["auroc"] = dataclasses.asdict(interval)
    summary["at_0.5"] = compute_metrics(label, score, FIXED_THRESHOLD)
    # One class on dev defines no threshold of its own; the entry says so by being null.
    summary["at_dev_threshold"] = compute_metrics(label, score, threshold) if np.isfinite(threshold) else None
    return summary


def describe_localization(run: Run, predictions: Predictions, threshold: float) -> dict[str, Any] | None:
    """Return how attention and evidence fall on the true boxes of the split's positives; None without any box.

    Beside them stand the controls that look at no image. On phantoms the boxes are the hearts', and negatives have
    them too; they are left out here as they are in NIH's list.
    """
    split = run.dataset.splits[predictions.split]
    rows, boxes, hearts = _find_boxes(split, predictions.label)
    if not len(rows):
        return None
    patients, size = predictions.index["patient"][rows], run.dataset.image_size
    geometry = {"stride": run.model.backbone.stride, "offset": run.model.backbone.offset, "rule": RULE}
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}

    def score(maps: np.ndarray, scaling: str) -> LocalizationScores:
        return score_maps(maps[rows], boxes, patients, size, scaling=scaling, heart_masks=hearts, **geometry)

    scores = {"attention": score(predictions.attention, "unit"), "evidence": score(predictions.evidence, "positive")}
    map_size = predictions.attention.shape[1:]
    scores |= score_controls(boxes, patients, size, map_size, seed=run.config.seed, **geometry)
    return {
        "protocol": f"true positives and misses alike; {RULE}; largest 8-connected component; {len(rows)} boxed images",
        "num_images": len(rows),
        "num_patients": len(np.unique(patients)),
        "num_predicted_positive": int((predictions.score[rows] >= threshold).sum()),
        "maps": {
            name: {key: dataclasses.asdict(value) for key, value in summarize(rows_, **options).items()}
            for name, rows_ in scores.items()
        },
    }


def _find_boxes(split: Split, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rows, boxes, hearts = [], [], []
    for row in np.flatnonzero(labels == 1):
        record = split.source[int(row)]
        if len(record["boxes"]):
            rows.append(row)
            boxes.append(record["boxes"][0])
            if "heart_mask" in record:
                hearts.append(record["heart_mask"][..., 0])
    return np.array(rows, int), np.array(boxes, float).reshape(-1, 4), np.array(hearts) if hearts else None


def describe_thumbnail_baseline(run: Run, test: Predictions) -> dict[str, Any] | None:
    """Return the test AUROC of logistic regression on 8x8 thumbnails, fitted to the same training images."""
    train, split = run.dataset.splits["train"], run.dataset.splits[test.split]
    try:
        features = _read_thumbnails(train)
        model = fit_thumbnail_baseline(features, train.index["label"], train.index["patient"])
    except UserError as error:
        log.warning("no thumbnail baseline: %s", error)
        return None
    scores = model.predict_proba(_read_thumbnails(split))[:, 1]
    interval = bootstrap_interval(
        test.label,
        scores,
        test.index["patient"],
        num_resamples=run.config.eval.num_bootstrap,
        seed=run.config.seed,
    )
    return {"auroc": dataclasses.asdict(interval), "num_train_images": len(features)}


def _read_thumbnails(split: Split) -> np.ndarray:
    images = (split.read_image(row) for row in range(len(split.source)))
    return np.concatenate([compute_thumbnail_features(image[None]) for image in images])


def format_summary(report: dict[str, Any]) -> str:
    """Return the closing lines: AUROC, the paper's row at both thresholds, the baseline, localisation."""
    test = report["test"]
    lines = [
        "CHEST PHANTOM: drawings, not X-rays of patients" if report["phantom"] else "NIH ChestX-ray14",
        f"test: {test['num_images']:,} images, {test['num_positives']:,} positive, {test['num_patients']:,} patients",
        f"test AUROC {_format_interval(test['auroc'])} (95 % interval, bootstrap over patients)",
    ]
    if report["thumbnail_baseline"]:
        baseline = _format_interval(report["thumbnail_baseline"]["auroc"])
        lines.append(f"8x8 thumbnail + logistic regression on the same images: AUROC {baseline}")
    for name in ("at_0.5", "at_dev_threshold"):
        row = test[name]
        if row is not None:
            lines.append(
                f"at threshold {row['threshold']:.3f}{' (chosen on dev)' if 'dev' in name else ''}: "
                f"accuracy {row['accuracy']:.3f}, cardiomegaly P {row['precision']:.3f} R {row['recall']:.3f} "
                f"F1 {row['f1']:.3f}, weighted P {row['precision_weighted']:.3f} R {row['recall_weighted']:.3f} "
                f"F1 {row['f1_weighted']:.3f}, [[TN, FP], [FN, TP]] = {row['confusion_matrix']}"
            )
    return "\n".join(lines + _format_localization(report["localization"]))


def _format_localization(localization: dict[str, Any] | None) -> list[str]:
    if localization is None:
        return []
    lines = [
        f"localisation on {localization['num_images']} boxed positives of {localization['num_patients']} patients:"
    ]
    for name, values in localization["maps"].items():
        shown = {key: values[key] for key in ("pointing", "energy_ratio", "mean_iou")}
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {_format_interval(value)}"
            for key, value in shown.items()
            if np.isfinite(value["estimate"])
        )
        lines.append(f"  {name.replace('_', ' ')}: {numbers}")
    return lines


def _format_interval(interval: dict[str, float]) -> str:
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
