"""Levels of maps at which boxes are cut, tuned on the hearts of chest phantoms: nothing is fitted to true boxes."""

import dataclasses
import logging
import pathlib

from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions
from cxa_jax.localization import score_maps
from cxa_jax.map_evaluation import SCALINGS, BoxedImages
from cxa_jax.model_names import name_backbone
from cxa_jax.run import Run
from cxa_jax.trained_network import read_metrics

log = logging.getLogger(__name__)

TUNED_LEVELS = tuple(level / 20 for level in range(1, 20))
NUM_TUNED = 60  # boxed dev images that a level is tuned on


@dataclasses.dataclass(frozen=True)
class MapLevels:
    """Levels of scaled maps.

    Attributes:
      levels: map -> level in (0, 1).
      source: where they come from, in words.
    """

    levels: dict[str, float]
    source: str


def find_levels(run: Run, tuned: dict[str, dict[str, float]] | None) -> MapLevels | None:
    """Return a phantom run's own levels, or for X-rays those of the run that the config names; None without any.

    config.eval.levels_run is that run; where it is empty, config.init.run is, if it was on phantoms.

    Args:
      run: what is evaluated.
      tuned: `tune_levels` on its dev split.

    Raises:
      UserError: config.eval.levels_run is no tested phantom run.
    """
    if tuned:
        return MapLevels({name: row["threshold"] for name, row in tuned.items()}, "dev hearts of this run's phantoms")
    named = run.config.eval.levels_run
    folder = named or run.config.init.run
    if run.dataset.is_phantom or not folder:
        return None
    metrics = read_metrics(pathlib.Path(folder).expanduser())
    found = metrics and metrics.get("phantom_tuned_levels")
    if found:
        config = metrics["config"]
        model = "-".join([name_backbone(config), config["model.pooling"], config["model.head"]])
        source = f"dev hearts of the phantoms of {pathlib.Path(folder).name} ({model}, {metrics['image_size']} px)"
        return MapLevels({name: row["threshold"] for name, row in found.items()}, source)
    if named:
        raise UserError(f"config.eval.levels_run={named} is no tested run on chest phantoms; run it to its end first")
    log.info("no levels of maps were tuned on phantoms: config.eval.levels_run names a phantom run that did")
    return None


def tune_levels(run: Run, predictions: Predictions, boxed: BoxedImages) -> dict[str, dict[str, float]] | None:
    """Find for each map the level of the highest mean IoU on a phantom's dev boxes; None on X-rays or without a box.

    They can then be stated for X-rays, whose boxes no threshold is ever fitted to: config.eval.levels_run.

    Returns:
      map -> {'threshold', 'mean_iou', 'num_images'}.
    """
    if not run.dataset.is_phantom or not len(boxed.rows):
        return None
    rows, boxes = boxed.rows[:NUM_TUNED], boxed.boxes[:NUM_TUNED]
    geometry = {"stride": run.model.backbone.stride, "offset": run.model.backbone.offset}
    tuned = {}
    for name, maps in predictions.maps.items():
        options = geometry | {"scaling": SCALINGS[name]}
        patients = predictions.index["patient"][rows]
        overlap = {
            level: score_maps(maps[rows], boxes, patients, run.dataset.image_size, rule=level, **options).iou.mean()
            for level in TUNED_LEVELS
        }
        best = max(overlap, key=overlap.get)
        tuned[name] = {"threshold": best, "mean_iou": float(overlap[best]), "num_images": len(rows)}
    return tuned
