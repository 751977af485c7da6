"""Score a run's maps on the boxed positives of a split, beside controls that saw no image or learnt nothing."""

import dataclasses
import logging

import jax
import numpy as np

from cxa_jax.data.datasets import Split
from cxa_jax.evaluate import Predictions, evaluate_split
from cxa_jax.heat_maps import RULES
from cxa_jax.localization import score_controls, score_maps
from cxa_jax.localization_table import RANDOM_WEIGHTS, TUNED, LocalizationTable, find_leading_map
from cxa_jax.run import Run
from cxa_jax.sharding import put_replicated
from cxa_jax.steps import CONTROL

log = logging.getLogger(__name__)

# W stands on its fixed scale; signed maps are cut at 0; p is stretched (`scale_map`).
SCALINGS = {"attention": "unit", "weights": "min_max"} | dict.fromkeys(("evidence", "cam", "grad_cam"), "positive")
DEFAULT_LEVEL = 0.5  # of the random map, where the run's leading map has no tuned level
PROTOCOL = (
    "map -> aligned bilinear upsampling -> scaling (W fixed 0-1, p min-max, signed maps cut at 0 and divided by their "
    "maximum) -> threshold -> 8-connected components (all for 60 and 180, else the largest) -> tight box; an empty map "
    "is a miss; no threshold is fitted to the boxes. Grad-CAM and evidence hold the attention fixed"
)


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """The positives of a split that have a true box: rows [N], boxes [N, 4] in px, hearts [N, H, W] or None.

    On phantoms the boxes are the hearts', and negatives have them too; they are left out as in NIH's list.
    """

    rows: np.ndarray
    boxes: np.ndarray
    hearts: np.ndarray | None


def find_boxed_images(split: Split) -> BoxedImages:
    """Read the positives' boxes, and their heart masks where the data have them."""
    rows, boxes, hearts = [], [], []
    for row in np.flatnonzero(split.index["label"] == 1):
        record = split.source[int(row)]
        if len(record["boxes"]):
            rows.append(row)
            boxes.append(record["boxes"][0])
            if "heart_mask" in record:
                hearts.append(record["heart_mask"][..., 0])
    boxes = np.array(boxes, float).reshape(-1, 4)
    return BoxedImages(np.array(rows, int), boxes, np.array(hearts) if hearts else None)


def evaluate_maps(
    run: Run, predictions: Predictions, boxed: BoxedImages, threshold: float, levels: dict[str, float] | None = None
) -> LocalizationTable | None:
    """Score every map of the boxed images under every rule, and the controls; None without any box.

    Args:
      predictions: of the split whose boxes they are.
      threshold: of a predicted positive, chosen on dev.
      levels: by map, tuned on phantoms (`map_levels`): one more rule for the maps that have one.
    """
    if not len(boxed.rows):
        return None
    rows, size = boxed.rows, run.dataset.image_size
    patients = predictions.index["patient"][rows]
    geometry = {"stride": run.model.backbone.stride, "offset": run.model.backbone.offset}
    maps = {name: values[rows] for name, values in predictions.maps.items()}
    scalings = {name: SCALINGS[name] for name in maps}
    for name, values in _predict_with_random_weights(run, predictions.split, rows).items():
        if name in maps:
            maps[RANDOM_WEIGHTS + name], scalings[RANDOM_WEIGHTS + name] = values, SCALINGS[name]
    scores = {}
    for rule in (*RULES, TUNED) if levels else RULES:
        for name, values in maps.items():
            level = levels and levels.get(name.removeprefix(RANDOM_WEIGHTS))
            if rule != TUNED or level:
                scores[name, rule] = score_maps(
                    values,
                    boxed.boxes,
                    patients,
                    size,
                    scaling=scalings[name],
                    heart_masks=boxed.hearts,
                    rule=level if rule == TUNED else rule,
                    **geometry,
                )
        leading = find_leading_map(maps)  # the random map is taken as it is
        level = levels.get(leading, DEFAULT_LEVEL) if rule == TUNED else rule
        map_size = predictions.attention.shape[1:]
        options = geometry | {"seed": run.config.seed, "rule": level, "scaling": scalings.get(leading, "unit")}
        controls = score_controls(boxed.boxes, patients, size, map_size, **options)
        scores |= {(name, rule): values for name, values in controls.items()}
    called = predictions.score[rows] >= threshold
    return LocalizationTable(np.asarray(predictions.index["id"])[rows], called, scores)


def _predict_with_random_weights(run: Run, split_name: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the maps of a freshly initialised network: what architecture and position alone put into them."""
    split = run.dataset.splits[split_name]
    index = {name: values[rows] for name, values in split.index.items()}
    subset = Split(split.name, [split.source[int(row)] for row in rows], index)
    key = jax.random.fold_in(run.root_key, CONTROL)
    state = run.draw_state(key)
    predicted = evaluate_split(
        run.test_step,
        put_replicated(state.variables, run.mesh),
        subset,
        run.mesh,
        batch_size=run.config.eval.batch_size,
        num_threads=0,
        show_progress=False,
    )
    finite = {name: maps for name, maps in predicted.maps.items() if np.isfinite(maps).all()}
    if len(finite) < len(predicted.maps):
        log.warning("the freshly initialised network overflows: its maps are left out of the controls")
    return finite
