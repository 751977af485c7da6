"""Threshold rules of maps, tuned on the hearts of chest phantoms' dev split: nothing is fitted to boxes of patients."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cxa_jax.boxes import compute_iou
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import (
    Rule,
    cut_percentiles,
    enclose,
    find_stacked_boxes,
    read_rule,
    says_where,
    scale_map,
    upsample_maps,
)
from cxa_jax.localization import BoxedImages, score_maps
from cxa_jax.localization_table import SHUFFLED, split_control
from cxa_jax.map_mass import locate_mass
from cxa_jax.model_names import name_backbone
from cxa_jax.run import Run
from cxa_jax.scored_maps import MAP_KINDS
from cxa_jax.threshold_free import Frame, reduce_frame
from cxa_jax.trained_network import read_metrics

log = logging.getLogger(__name__)

LEVELS = np.arange(1, 20) / 20
PERCENTILES = np.concatenate([np.arange(50, 97.5, 2.5), np.arange(97.5, 100, 0.5)])
CUTS = tuple(("level", float(value)) for value in LEVELS) + tuple(("percentile", float(p)) for p in PERCENTILES)
TUNED_COMPONENTS = ("largest", "all")
POWERS = (1.0, 2.0, 4.0)  # of the rule 'mass'
SHARES = np.arange(1, 100) / 100
NUM_TUNED = 120  # boxed dev images that a rule is tuned on


@dataclasses.dataclass(frozen=True)
class MapRules:
    """Rules by map.

    Attributes:
      rules: map -> Rule, with its scaling.
      source: where they come from, in words.
    """

    rules: dict[str, Rule]
    source: str

    def describe(self) -> dict[str, Any]:
        """Return what metrics.json holds of it."""
        return {"rules": {name: rule._asdict() for name, rule in self.rules.items()}, "source": self.source}


def find_rules(run: Run, tuned: dict[str, dict[str, Any]] | None) -> MapRules | None:
    """Return a phantom run's own rules, or for X-rays those of the run that the config names; None without any.

    config.eval.levels_run is that run; where it is empty, config.init.run is, if it was on phantoms.

    Args:
      run: what is evaluated.
      tuned: `tune_rules` on its dev split.

    Raises:
      UserError: config.eval.levels_run is no tested phantom run, or was tested by an older version.
    """
    if tuned:
        return MapRules(_read_rules(tuned), "dev hearts of this run's phantoms")
    named = run.config.eval.levels_run
    folder = named or run.config.init.run
    if run.dataset.is_phantom or not folder:
        return None
    metrics = read_metrics(pathlib.Path(folder).expanduser())
    found = metrics and metrics.get("phantom_tuned_rules")
    if found:
        config = metrics["config"]
        model = "-".join([name_backbone(config), config["model.pooling"], config["model.head"]])
        source = f"dev hearts of the phantoms of {pathlib.Path(folder).name} ({model}, {metrics['image_size']} px)"
        return MapRules(_read_rules(found), source)
    if named and metrics and "phantom_tuned_levels" in metrics:
        raise UserError(
            f"config.eval.levels_run={named} was tested by an older version, which tuned no rules; run its command "
            "again with --mode=evaluate"
        )
    if named:
        raise UserError(f"config.eval.levels_run={named} is no tested run on chest phantoms; run it to its end first")
    log.info("no rules of maps were tuned on phantoms: config.eval.levels_run names a phantom run that did")
    return None


def _read_rules(tuned: dict[str, dict[str, Any]]) -> dict[str, Rule]:
    return {name: read_rule(row) for name, row in tuned.items()}


def tune_rules(run: Run, maps: Mapping[str, np.ndarray], boxed: BoxedImages) -> dict[str, dict[str, Any]] | None:
    """Find for each map the rule of the highest mean IoU on a phantom's dev boxes; None on X-rays or without a box.

    Levels and percentiles, the largest component or a box about all of them, and shares of the map's mass, in the
    scalings that the map allows (`MAP_KINDS`). The image's thumbnail, mean maps and those of random weights have rules
    of their own, shuffled maps that of their map. The rules can then be stated for X-rays, whose boxes none is ever
    fitted to: config.eval.levels_run.

    Args:
      run: whose dev split it is.
      maps: map or control -> [N, h, w], of the boxed images (`map_evaluation.collect_maps`).
      boxed: the images; the first NUM_TUNED are tuned on.

    Returns:
      map -> the rule's fields, 'mean_iou' and 'num_images'.
    """
    if not run.dataset.is_phantom or not len(boxed.rows):
        return None
    boxes, tuned = boxed.boxes[:NUM_TUNED], {}
    geometry = (run.dataset.image_size, run.model.backbone.stride, run.model.backbone.offset)
    for name, values in maps.items():
        control, of_map = split_control(name)
        if control == SHUFFLED:
            continue
        kind, values = MAP_KINDS[of_map], values[:NUM_TUNED]
        rule = find_best_rule(values, boxes, reduce_frame(*geometry), kind.tuned_scalings)
        scores = score_maps(values, boxes, np.arange(len(boxes)), *geometry, rule, scaling=kind.scaling)
        tuned[name] = rule._asdict() | {"mean_iou": float(scores.iou.mean()), "num_images": len(boxes)}
    return tuned


def find_best_rule(maps: np.ndarray, boxes: np.ndarray, frame: Frame, scalings: tuple[str, ...]) -> Rule:
    """Return the rule of the highest mean IoU, the first of equals.

    Args:
      maps: [N, h, w].
      boxes: [N, 4], px of the image.
      frame: the frame that boxes are found in.
      scalings: of `scale_map`, to choose from.
    """
    overlap, boxes = np.zeros((len(scalings), len(TUNED_COMPONENTS), len(CUTS))), boxes * frame.scale
    places = np.full((len(scalings), len(POWERS), len(maps), 2, len(SHARES)), np.nan)
    for row, (cells, box) in enumerate(zip(maps, boxes, strict=True)):
        upsampled = upsample_maps(cells, frame.image_size, frame.stride, frame.offset)
        for index, scaling in enumerate(scalings):
            values = scale_map(upsampled, scaling)
            overlap[index] += compute_iou(detect_by_cuts(values), box)
            if says_where(values):
                places[index, :, row] = [locate_mass(values**power, SHARES) for power in POWERS]
    scaling, components, cut = np.unravel_index(overlap.argmax(), overlap.shape)
    rules = {Rule(*CUTS[cut], TUNED_COMPONENTS[components], scalings[scaling]): overlap.max() / len(maps)}
    for index, power in np.ndindex(len(scalings), len(POWERS)):
        shares, mean_iou = choose_shares(places[index, power], boxes)
        rules[Rule("mass", POWERS[power], scaling=scalings[index], shares=shares)] = mean_iou
    return max(rules, key=rules.get)


def choose_shares(places: np.ndarray, boxes: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Choose for each edge the share of a map's mass that lies nearest to it: of the least mean distance.

    Args:
      places: y and x of `SHARES`, [N, 2, Q], px; nan of maps that say nothing, which are misses.
      boxes: [N, 4], px.

    Returns:
      (left, right, top, bottom) of `SHARES`, and the mean IoU of the boxes that they make.
    """
    said = np.isfinite(places).all(axis=(1, 2))
    if not said.any():
        return (0.25, 0.75, 0.25, 0.75), 0.0
    (x, y, w, h), ys, xs = boxes[said].T, places[said, 0], places[said, 1]
    chosen = [
        int(np.abs(along - edge[:, None]).mean(axis=0).argmin())
        for along, edge in ((xs, x), (xs, x + w), (ys, y), (ys, y + h))
    ]
    left, right, top, bottom = xs[:, chosen[0]], xs[:, chosen[1]], ys[:, chosen[2]], ys[:, chosen[3]]
    if not (chosen[0] < chosen[1] and chosen[2] < chosen[3]):  # a map that lies all on one side of the place
        return (0.25, 0.75, 0.25, 0.75), 0.0
    overlap = compute_iou(np.stack([left, top, right - left, bottom - top], axis=1), boxes[said])
    return tuple(float(SHARES[share]) for share in chosen), float(overlap.sum() / len(boxes))


def detect_by_cuts(values: np.ndarray) -> np.ndarray:
    """Return what `detect_boxes` finds at each of `CUTS`, [components, cuts, 4], all at once; nan for a miss.

    Args:
      values: [H, W] in [0, 1].
    """
    found = np.full((len(TUNED_COMPONENTS), len(CUTS), 4), np.nan)
    if not says_where(values):
        return found
    masks = np.concatenate([values >= LEVELS[:, None, None], cut_percentiles(values, PERCENTILES)])
    boxes, cuts, sizes = find_stacked_boxes(masks)
    order = np.lexsort((np.arange(len(cuts)), -sizes, cuts))  # by cut, the one of most pixels first
    present, first = np.unique(cuts[order], return_index=True)
    found[TUNED_COMPONENTS.index("largest"), present] = boxes[order][first]
    found[TUNED_COMPONENTS.index("all")] = enclose(masks)
    return found
