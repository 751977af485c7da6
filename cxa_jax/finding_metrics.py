"""What a network with one attention map for each finding says of the thirteen others; Cardiomegaly is reported as ever.

Without config.data.other_findings the images are Cardiomegaly or No Finding. Another finding is then only seen beside
cardiomegaly, and telling it from nothing at all is largely telling cardiomegaly: the AUROC among the images with
cardiomegaly is the one without that shortcut.
"""

import csv
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np

from cxa_jax.evaluate import Predictions
from cxa_jax.findings import FINDINGS, encode_findings
from cxa_jax.statistics import bootstrap_interval
from cxa_jax.workdir import to_json, write_atomically


def compute_finding_metrics(predictions: Predictions, num_resamples: int, seed: int) -> dict[str, Any]:
    """Compute for each finding its number of positives and its AUROC, with patient-clustered intervals.

    Returns:
      FINDING -> num_positives, auroc (all images), auroc_within_cardiomegaly; an AUROC is None where one class is
      missing.
    """
    labels = encode_findings(predictions.index["findings"])
    patients, within = predictions.index["patient"], predictions.label == 1

    def auroc(column: int, rows: np.ndarray) -> dict[str, Any] | None:
        label, logit = labels[rows, column], predictions.finding_logits[rows, column]
        if len(np.unique(label)) < 2:
            return None
        options = {"num_resamples": num_resamples, "seed": seed}
        return dataclasses.asdict(bootstrap_interval(label, logit, patients[rows], **options))

    return {
        name: {
            "num_positives": int(labels[:, column].sum()),
            "auroc": auroc(column, np.ones(len(labels), bool)),
            "auroc_within_cardiomegaly": auroc(column, within),
        }
        for column, name in enumerate(FINDINGS)
    }


def write_findings(predictions: Predictions, num_resamples: int, seed: int, output: pathlib.Path) -> None:
    """Write findings_SPLIT.json, the metrics, and findings_SPLIT.csv, label and logit of each image and finding."""
    metrics = compute_finding_metrics(predictions, num_resamples, seed)
    write_atomically(output / f"findings_{predictions.split}.json", to_json(metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "patient", *(f"{name}_{kind}" for name in FINDINGS for kind in ("label", "logit"))])
    index = predictions.index
    labels = encode_findings(index["findings"])
    for image_id, patient, label, logit in zip(
        index["id"], index["patient"], labels, predictions.finding_logits, strict=True
    ):
        pairs = (value for one in zip(label.tolist(), logit.tolist(), strict=True) for value in one)
        writer.writerow([image_id, patient, *pairs])
    write_atomically(output / f"findings_{predictions.split}.csv", text.getvalue())
