"""Score heat maps against boxes: overlap, pointing game, energy, and the controls that look at no image.

Protocol: map [h, w] -> aligned bilinear upsampling -> scaling -> threshold -> 8-connected components -> tight
boxes (`cxa_jax.heat_maps`) -> comparison with the one true box. No threshold is fitted to the true boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.boxes import (
    check_boxes,
    compute_coverage,
    compute_iobb,
    compute_iou,
    compute_median_boxes,
    contains,
    round_boxes,
)
from cxa_jax.errors import UserError
from cxa_jax.group_statistics import bootstrap_group_means
from cxa_jax.heat_maps import (
    Rule,
    compute_cell_centers,
    detect_boxes,
    height_and_width,
    make_rule,
    scale_map,
    upsample_maps,
)
from cxa_jax.intervals import Interval
from cxa_jax.statistics import NUM_RESAMPLES

IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
IOBB_THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class BoxedImages:
    """The positives of a split that have a true box: rows [N], boxes [N, 4] in px, hearts [N, H, W] or None.

    On phantoms the boxes are the hearts', and negatives have them too; they are left out as in NIH's list.
    """

    rows: np.ndarray
    boxes: np.ndarray
    hearts: np.ndarray | None


@dataclass(frozen=True)
class LocalizationScores:
    """Scores of N images. A map without anything above the threshold is a miss: IoU, IoBB 0, no box, no false one.

    Attributes:
        patients: [N].
        predicted: [N, 4] largest detected box, nan for a miss.
        num_boxes: [N] detected boxes.
        iou: [N] best IoU over the detected boxes.
        iobb: [N] best IoBB over the detected boxes.
        false_positives: [N, 5] detected boxes whose IoBB does not exceed each of `IOBB_THRESHOLDS`.
        pointing: [N] 1 where the strongest cell's centre lies in the box; a share where several cells are strongest;
            of a box that is given, where its centre lies there.
        box_pointing: [N] 1 where the centre of the largest detected box lies in the box; 0 for a miss.
        energy_ratio: [N] share of the map's sum inside the box over the box's share of the image; 1 is chance;
            nan for a map of zeros.
        heart_energy_ratio: [N] the same for a heart mask; nan without one.
    """

    patients: np.ndarray
    predicted: np.ndarray
    num_boxes: np.ndarray
    iou: np.ndarray
    iobb: np.ndarray
    false_positives: np.ndarray
    pointing: np.ndarray
    box_pointing: np.ndarray
    energy_ratio: np.ndarray
    heart_energy_ratio: np.ndarray

    def __len__(self) -> int:
        return len(self.iou)

    def subset(self, keep: ArrayLike) -> Self:
        """Return the rows of a boolean or integer index, such as the predicted positives."""
        return type(self)(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


def compute_energy_ratio(values: np.ndarray, region: np.ndarray) -> float:
    """Compute (sum inside / sum) / (region's share of the image); 1 is chance, nan for a map or region of zeros.

    Args:
        values: [H, W], non-negative.
        region: [H, W] in [0, 1], a mask or the coverage of a box.
    """
    total, share = values.sum(), region.mean()
    return float((values * region).sum() / total / share) if total > 0 and share > 0 else float("nan")


def compute_pointing(values: np.ndarray, box: np.ndarray, stride: float, offset: float) -> float:
    """Play the pointing game on a map [h, w]: the share of its strongest cells whose centre pixel lies in the box."""
    rows, columns = np.nonzero(values == values.max())
    x, y = compute_cell_centers(values.shape[1], stride, offset), compute_cell_centers(values.shape[0], stride, offset)
    return float(contains(box, x[columns] + 0.5, y[rows] + 0.5).mean())


def score_maps(
    maps: ArrayLike,
    boxes: ArrayLike,
    patients: ArrayLike,
    image_size: int | tuple[int, int],
    stride: float,
    offset: float,
    rule: Rule | str | float,
    *,
    scaling: str = "min_max",
    heart_masks: ArrayLike | None = None,
) -> LocalizationScores:
    """Score maps against one true box each under one rule; arguments as of `score_maps_by_rules`."""
    options = {"scaling": scaling, "heart_masks": heart_masks}
    return score_maps_by_rules(maps, boxes, patients, image_size, stride, offset, [rule], **options)[0]


def score_maps_by_rules(
    maps: ArrayLike,
    boxes: ArrayLike,
    patients: ArrayLike,
    image_size: int | tuple[int, int],
    stride: float,
    offset: float,
    rules: Sequence[Rule | str | float],
    *,
    scaling: str = "min_max",
    heart_masks: ArrayLike | None = None,
) -> list[LocalizationScores]:
    """Score maps against one true box each; images are taken one by one, so memory does not grow with N.

    Args:
        maps: [N, h, w], finite.
        boxes: [N, 4] x, y, w, h in px of the image that the backbone saw.
        patients: [N].
        image_size: (H, W) or the side of a square, px, of that image.
        stride: px between cells.
        offset: px of cell 0's centre.
        rules: threshold rules, see `heat_maps.Rule`; one with a scaling of its own has it for its boxes alone.
        scaling: see `scale_map`; W needs 'unit', signed evidence 'positive' or 'absolute'.
        heart_masks: [N, H, W], non-zero on the heart (phantom); adds heart_energy_ratio.

    Returns:
        Scores under each rule; pointing and energy are the same in all.

    Raises:
        UserError: maps, boxes, patients or masks that do not fit together, a map with nan, a box outside the image, an
            unknown rule or scaling.
    """
    maps, patients = np.asarray(maps, np.float64), np.asarray(patients)
    rules, (height, width) = [make_rule(rule) for rule in rules], height_and_width(image_size)
    boxes = check_boxes(boxes, height, width)
    if maps.ndim != 3 or not len(maps) == len(boxes) == len(patients):
        raise UserError(
            f"needed are maps [N, h, w], boxes [N, 4], patients [N]; got {maps.shape}, {boxes.shape}, {patients.shape}"
        )
    if heart_masks is not None and np.shape(heart_masks) != (len(maps), height, width):
        raise UserError(f"heart_masks have shape {np.shape(heart_masks)}, images {(len(maps), height, width)}")
    broken = ~np.isfinite(maps).all(axis=(1, 2))
    if broken.any():
        raise UserError(f"maps[{int(np.argmax(broken))}] holds nan or infinity ({int(broken.sum())} of {len(maps)} do)")
    rows = [[] for _ in rules]
    for index, (cells, box) in enumerate(zip(maps, boxes, strict=True)):
        upsampled = upsample_maps(cells, (height, width), stride, offset)
        values = scale_map(upsampled, scaling)
        strength = np.abs(cells) if scaling == "absolute" else cells
        same = {
            "pointing": compute_pointing(strength, box, stride, offset) if values.max() > 0 else 0.0,
            "energy_ratio": compute_energy_ratio(values, compute_coverage(box, height, width)),
        }
        if heart_masks is not None:
            same["heart_energy_ratio"] = compute_energy_ratio(values, np.asarray(heart_masks[index]) != 0)
        for rule, scored in zip(rules, rows, strict=True):
            cut = values if rule.scaling in (None, scaling) else scale_map(upsampled, rule.scaling)
            scored.append(_score_detections(detect_boxes(cut, rule), box) | same)
    return [_stack_rows(scored, patients) for scored in rows]


def _points_into(box: np.ndarray, found: np.ndarray) -> bool:
    """Tell whether the first of the boxes found [K, 4] has its centre in the true one; no box points nowhere."""
    return len(found) > 0 and bool(contains(box, *(found[0, :2] + found[0, 2:] / 2)))


def _score_detections(detected: np.ndarray, box: np.ndarray) -> dict[str, np.ndarray | float]:
    iobb = compute_iobb(detected, box)
    return {
        "predicted": detected[0] if len(detected) else np.full(4, np.nan),
        "num_boxes": float(len(detected)),
        "iou": compute_iou(detected, box).max(initial=0.0),
        "iobb": iobb.max(initial=0.0),
        "false_positives": np.array([np.sum(iobb <= threshold) for threshold in IOBB_THRESHOLDS], np.float64),
        "pointing": np.nan,
        "box_pointing": float(_points_into(box, detected)),
        "energy_ratio": np.nan,
        "heart_energy_ratio": np.nan,
    }


def _stack_rows(rows: list[dict[str, np.ndarray | float]], patients: np.ndarray) -> LocalizationScores:
    shapes = {"predicted": (4,), "false_positives": (len(IOBB_THRESHOLDS),)}
    names = [field.name for field in fields(LocalizationScores) if field.name != "patients"]
    columns = {
        name: np.array([row[name] for row in rows], np.float64).reshape(len(rows), *shapes.get(name, ()))
        for name in names
    }
    return LocalizationScores(patients=patients, **columns)


def score_boxes(predicted: ArrayLike, boxes: ArrayLike, patients: ArrayLike) -> LocalizationScores:
    """Score one predicted box [4] for each image; it points at its centre. A nan box scores nan: nothing was said."""
    rows = []
    for guess, box in zip(np.asarray(predicted, np.float64), np.asarray(boxes, np.float64), strict=True):
        row = _score_detections(guess[None], box)
        row["pointing"] = row["box_pointing"]
        if not np.isfinite(guess).all():
            row = {name: np.full_like(value, np.nan) for name, value in row.items()}
        rows.append(row)
    return _stack_rows(rows, np.asarray(patients))


def score_controls(
    boxes: ArrayLike,
    patients: ArrayLike,
    image_size: int | tuple[int, int],
    map_size: tuple[int, int],
    stride: float,
    offset: float,
    rule: Rule | str | float,
    *,
    scaling: str = "min_max",
    seed: int | np.random.Generator = 0,
) -> dict[str, LocalizationScores]:
    """Score what looks at no image, and what a grid allows, to be printed beside every model.

    Returns:
        'median_box': the median box of the other patients; 'image_centre': points at the centre (only `pointing` is
        defined); 'random_map': independent uniform cells in [0, 1] on the model's grid, taken the model's way;
        'grid_box': the true box rounded to whole cells (`round_boxes`), no control but a measure of the grid.
    """
    height, width = height_and_width(image_size)
    boxes, patients = check_boxes(boxes, height, width), np.asarray(patients)
    nowhere = score_boxes(np.full_like(boxes, np.nan), boxes, patients)
    centre = contains(boxes, width / 2, height / 2).astype(np.float64)
    random_maps = np.random.default_rng(seed).random((len(boxes), *map_size))
    return {
        "median_box": score_boxes(compute_median_boxes(boxes, patients), boxes, patients),
        "image_centre": replace(nowhere, pointing=centre),
        "random_map": score_maps(random_maps, boxes, patients, (height, width), stride, offset, rule, scaling=scaling),
        "grid_box": score_boxes(round_boxes(boxes, map_size, (height, width)), boxes, patients),
    }


def summarize(
    scores: LocalizationScores,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int | np.random.Generator = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute means over images with patient-bootstrap intervals.

    Returns:
        mean_iou; accuracy_iou_T and accuracy_iobb_T, shares of images whose best box exceeds T; false_positives_iobb_T,
        mean number of boxes that do not (AFP, Wang et al. 2017); pointing; energy_ratio; heart_energy_ratio;
        miss_rate. nan where no image defines the value.
    """
    columns, options = compute_columns(scores), {"num_resamples": num_resamples, "seed": seed, "level": level}
    kinds = {name: find_kind(name) for name in columns}
    return bootstrap_group_means([columns], scores.patients, kinds, **options)


def find_kind(metric: str) -> str:
    """Return the kind of a metric's per-image values, one of `group_statistics.MEAN_KINDS`."""
    if metric.startswith("false_positives"):
        return "count"
    return "ratio" if metric in ("energy_ratio", "heart_energy_ratio") else "share"


def compute_columns(scores: LocalizationScores) -> dict[str, np.ndarray]:
    """Return per-image values [N] by the name of their mean, as `summarize` lists them; nan where not defined."""
    known = np.isfinite(scores.num_boxes)
    columns = {"mean_iou": scores.iou}
    for threshold in IOU_THRESHOLDS:
        columns[f"accuracy_iou_{threshold:g}"] = np.where(known, scores.iou > threshold, np.nan)
    for index, threshold in enumerate(IOBB_THRESHOLDS):
        columns[f"accuracy_iobb_{threshold:g}"] = np.where(known, scores.iobb > threshold, np.nan)
        columns[f"false_positives_iobb_{threshold:g}"] = scores.false_positives[:, index]
    for name in ("pointing", "box_pointing", "energy_ratio", "heart_energy_ratio"):
        columns[name] = getattr(scores, name)
    columns["miss_rate"] = np.where(known, scores.num_boxes == 0, np.nan)
    return columns
