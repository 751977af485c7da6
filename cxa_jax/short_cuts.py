"""How much of a network's AUROC is a short cut: attributes alone, the heart hidden, the heart alone, maps elsewhere."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.array_types import PyTree
from cxa_jax.attribute_baseline import describe_attribute_baseline
from cxa_jax.boxes import compute_coverage, compute_median_box
from cxa_jax.classification import short_interval
from cxa_jax.comparison import paired_bootstrap
from cxa_jax.data.datasets import Split
from cxa_jax.distributed import stop_if_agreed
from cxa_jax.evaluate import Predictions, evaluate_split
from cxa_jax.localization import BoxedImages
from cxa_jax.localization_table import LocalizationTable, is_control
from cxa_jax.map_energy import describe_energy, measure_energy
from cxa_jax.run import Run
from cxa_jax.statistics import bootstrap_interval, bootstrap_means

log = logging.getLogger(__name__)

SHOWN = {"heart_greyed": False, "heart_alone": True}  # whether the inside of the box is what stays
BOX_PROTOCOL = (
    "pixels inside the box (greyed), or all others (alone), have the mean grey level of those that stay, before the "
    "network's normalisation: nothing of what is hidden enters. Every test image has the same box, the median of the "
    "boxed positives', so that its place and size tell no label; a heart beyond it stays seen. own_box: mean change of "
    "the logit of boxed positives, each with its own box"
)
ENERGY_PROTOCOL = (
    "share of a map's sum inside the box over the box's share of the image, mean over images; 1 is chance; maps "
    "upsampled and scaled as for boxes"
)


def measure_short_cuts(
    run: Run, variables: PyTree, test: Predictions, boxed: BoxedImages, table: LocalizationTable | None
) -> dict[str, Any]:
    """Return what metrics.json holds under 'short_cuts'; where test images have boxes, in two more passes over them.

    Args:
        run: what is evaluated.
        variables: of its network, on its devices.
        test: what it says of the test images.
        boxed: those with a box.
        table: scores of its maps on them, or None.

    Returns:
        `attributes` (`attribute_baseline`), `heart_box` and `energy`; None each where nothing is known of it.
    """
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}
    train = run.dataset.splits["train"].index
    found = {"attributes": describe_attribute_baseline(train, test.to_table(), **options)}
    if not len(boxed.rows):
        log.info("no image with the heart greyed out or alone: no positive test image has a box")
        return found | {"heart_box": None, "energy": None}
    box = compute_median_box(boxed.boxes)
    found["heart_box"] = _describe_heart_box(run, variables, test, boxed, box, **options)
    geometry = (run.dataset.image_size, run.model.backbone.stride, run.model.backbone.offset)
    index, own = test.index, {}
    for (name, _), scores in (table.scores if table else {}).items():  # the same under every rule
        if not is_control(name) and name not in own and np.isfinite(scores.energy_ratio).any():
            own[name] = scores.energy_ratio
    found["energy"] = {
        "protocol": ENERGY_PROTOCOL,
        "median_box": describe_energy(
            measure_energy(test.maps, box, *geometry), index["view"], test.label, index["patient"], **options
        ),
        "own_box": describe_energy(
            own,
            *(np.asarray(values)[boxed.rows] for values in (index["view"], test.label, index["patient"])),
            **options,
        ),
    }
    return found


def _describe_heart_box(
    run: Run, variables: PyTree, test: Predictions, boxed: BoxedImages, box: np.ndarray, **options: int
) -> dict[str, Any]:
    """Return AUROC with the heart greyed and alone, paired with the whole image's, and what own boxes do to logits."""
    patients, size = test.index["patient"], run.dataset.image_size
    changes = {}
    report = {
        "protocol": BOX_PROTOCOL,
        "box": box.tolist(),
        "share_of_image": float(compute_coverage(box, size, size).mean()),
        "num_boxed_images": len(boxed.rows),
        "num_boxed_patients": len(np.unique(patients[boxed.rows])),
        "whole": short_interval(bootstrap_interval(test.label, test.logit, patients, **options)),
    }
    for name, inside in SHOWN.items():
        rows = np.arange(len(test.label))
        logit = predict_covered(run, variables, test.split, rows, np.tile(box, (len(rows), 1)), inside)
        less = paired_bootstrap(test.label, logit, test.logit, patients, **options).difference
        report[name] = short_interval(bootstrap_interval(test.label, logit, patients, **options))
        report[f"{name}_less_whole"] = short_interval(less)
        own = predict_covered(run, variables, test.split, boxed.rows, boxed.boxes, inside)
        changes[name] = own.astype(np.float64) - test.logit[boxed.rows]
    means = bootstrap_means(changes, patients[boxed.rows], **options)
    return report | {"own_box": {f"{name}_logit_change": short_interval(means[name]) for name in SHOWN}}


def predict_covered(
    run: Run, variables: PyTree, split_name: str, rows: np.ndarray, boxes: np.ndarray, inside: bool
) -> np.ndarray:
    """Return the logits float32 [K] of images of which only the inside or only the outside of a box is shown.

    The step and the batches are those of a test, so nothing is compiled anew.

    Args:
        run: whose network and data.
        variables: of the network.
        split_name: 'dev' or 'test'.
        rows: [K], of the split.
        boxes: [K, 4], px, of each row.
        inside: True shows the inside.
    """
    stop_if_agreed()
    split = run.dataset.splits[split_name]
    covered = _Covered(split, rows, boxes, inside)
    index = {name: np.asarray(values)[rows] for name, values in split.index.items()}
    return evaluate_split(
        run.test_step,
        variables,
        Split(split.name, covered, index),
        run.mesh,
        batch_size=run.config.eval.batch_size,
        num_threads=run.config.data.num_threads,
        show_progress=False,
    ).logit


class _Covered(Sequence):
    """Images of a split, each covered when it is asked for."""

    def __init__(self, split: Split, rows: np.ndarray, boxes: np.ndarray, inside: bool):
        self._split, self._rows, self._boxes, self._inside = split, rows, boxes, inside

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        image = self._split.read_image(int(self._rows[place]))
        return {"image": cover_image(image, self._boxes[place], self._inside)}


def cover_image(image: np.ndarray, box: ArrayLike, inside: bool) -> np.ndarray:
    """Return an image of which one side of a box stays; the other has the mean grey level of what stays.

    The mean of the whole image would carry the heart's brightness into the image without a heart.

    Args:
        image: uint8 [H, W, 1].
        box: x, y, w, h, px; a pixel is inside where half of it is.
        inside: True keeps the inside.
    """
    shown = (compute_coverage(box, *image.shape[:2]) >= 0.5) == inside
    grey = image[shown].mean() if shown.any() else 0.0
    return np.where(shown[..., None], image, np.round(grey)).astype(np.uint8)
