"""Score a run's maps on the boxed positives of a split, beside controls that saw no image or learnt nothing."""

import dataclasses
from typing import Any

import numpy as np

from cxa_jax.box_reader import BoxReader, score_readers
from cxa_jax.data.datasets import Split
from cxa_jax.evaluate import Predictions
from cxa_jax.heat_maps import RULES, Rule
from cxa_jax.intervals import Interval
from cxa_jax.localization import BoxedImages, LocalizationScores, score_controls, score_maps_by_rules
from cxa_jax.localization_table import (
    ANSWERING,
    MEAN_MAP,
    RANDOM_WEIGHTS,
    SHUFFLED,
    TUNED,
    LocalizationTable,
    find_leading_map,
    is_control,
    split_control,
)
from cxa_jax.map_controls import MapControls, collect_thumbnails, draw_donors, predict_with_random_weights
from cxa_jax.map_rules import MapRules
from cxa_jax.run import Run
from cxa_jax.scored_maps import MAP_KINDS, THUMBNAIL, derive_maps
from cxa_jax.threshold_free import (
    compute_best_overlaps,
    count_pixels,
    find_level_boxes,
    summarize_threshold_free,
)

DEFAULT_RULE = Rule("level", 0.5)  # of the random map, where the run's leading map has no tuned rule
PROTOCOL = (
    "map -> aligned bilinear upsampling -> scaling (W fixed 0-1, p min-max, signed maps cut at 0 and divided by their "
    "maximum, or by magnitude) -> threshold -> 8-connected components (all for 60 and 180, else the largest; a tuned "
    "rule says which) -> tight box, or by shares of the map's mass the box beyond whose edges they lie; an empty map, "
    "or one of one value everywhere, is a miss; no threshold is fitted to the boxes. Grad-CAM and evidence hold the "
    "attention fixed"
)
THRESHOLD_FREE_PROTOCOL = (
    "MaxBoxAccV2 (arXiv 2007.04178): share of images with a component whose box reaches an IoU, at the level that is "
    "best on these very images, mean over IoU .3, .5, .7. PxAP: precision over recall of all images' pixels against "
    "the hearts' masks; chance is their share of the pixels"
)


@dataclasses.dataclass(frozen=True)
class Localization:
    """What the boxes say of a run's maps.

    Attributes:
      table: scores of each image under each rule.
      threshold_free: map -> metric -> interval.
      rules: tuned on phantoms, or None.
    """

    table: LocalizationTable
    threshold_free: dict[str, dict[str, Interval]]
    rules: MapRules | None


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
    run: Run,
    predictions: Predictions,
    boxed: BoxedImages,
    threshold: float,
    rules: MapRules | None = None,
    controls: MapControls | None = None,
    readers: dict[str, BoxReader] | None = None,
) -> Localization | None:
    """Score every map of the boxed images under every rule, and the controls; None without any box.

    Args:
      predictions: of the split whose boxes they are.
      threshold: of a predicted positive, chosen on dev.
      rules: tuned on phantoms: one more rule for the maps that have one.
      controls: of these maps (`map_controls.draw_controls`); None leaves those of random weights and mean maps out.
      readers: of boxes, fitted on phantoms (`phantom_readers`): one more rule, of readers by name.
    """
    if not len(boxed.rows):
        return None
    patients = predictions.index["patient"][boxed.rows]
    maps = collect_maps(run, predictions, boxed, controls)
    called = predictions.score[boxed.rows] >= threshold
    scores = _score_by_rules(run, predictions.attention.shape[1:], boxed, patients, maps, rules)
    if readers:
        scores |= score_readers(readers, maps, boxed.boxes, patients, run.dataset.image_size)
    table = LocalizationTable(np.asarray(predictions.index["id"])[boxed.rows], called, scores)
    chance = np.random.default_rng(run.config.seed).random((len(boxed.rows), *predictions.attention.shape[1:]))
    free = _score_without_threshold(run, boxed, patients, maps | {"random_map": chance})
    return Localization(table, free, rules)


def collect_maps(
    run: Run, predictions: Predictions, boxed: BoxedImages, controls: MapControls | None
) -> dict[str, np.ndarray]:
    """Return the maps of the boxed images by name, [K, h, w] each, and those of their controls.

    The shuffled map of an image is that of another patient's positive, drawn once from the run's seed.
    """
    rows = boxed.rows
    own = {name: values[rows] for name, values in derive_maps(predictions.maps).items()}
    untrained, mean_maps = {}, (controls and controls.mean_maps) or {}
    if controls:
        untrained = predict_with_random_weights(run, controls.random_weights, predictions.split, rows)
    donors = draw_donors(predictions.index["patient"][rows], run.config.seed)
    maps = dict(own)
    for name, values in own.items():
        if name in untrained:
            maps[f"{RANDOM_WEIGHTS}_{name}"] = untrained[name]
        if name in mean_maps:
            maps[f"{MEAN_MAP}_{name}"] = np.broadcast_to(mean_maps[name], values.shape)
        if donors is not None:
            maps[f"{SHUFFLED}_{name}"] = values[donors]
    return maps | {THUMBNAIL: collect_thumbnails(run, predictions, rows)}


def _score_by_rules(
    run: Run,
    map_size: tuple[int, int],
    boxed: BoxedImages,
    patients: np.ndarray,
    maps: dict[str, np.ndarray],
    tuned: MapRules | None,
) -> dict[tuple[str, str], LocalizationScores]:
    place = (boxed.boxes, patients, run.dataset.image_size)
    geometry = {"stride": run.model.backbone.stride, "offset": run.model.backbone.offset}
    scores = {}
    for name, values in maps.items():
        rules = dict(zip(RULES, RULES, strict=True)) | _tuned_rule(name, tuned)
        if is_control(name):  # for what answers alone, or most of the time would go into them
            rules = {rule: cut for rule, cut in rules.items() if rule in ANSWERING}
        options = geometry | {"scaling": _scaling_of(name), "heart_masks": boxed.hearts}
        found = score_maps_by_rules(values, *place, rules=list(rules.values()), **options)
        scores |= {(name, rule): each for rule, each in zip(rules, found, strict=True)}
    leading = find_leading_map(maps)  # the random map is taken as it is
    rules = dict(zip(RULES, RULES, strict=True))
    if tuned:
        rules |= {TUNED: DEFAULT_RULE} | _tuned_rule(leading or "", tuned)
    for name, rule in rules.items():
        options = geometry | {"rule": rule, "scaling": _scaling_of(leading) if leading else "unit"}
        controls = score_controls(*place, map_size, seed=run.config.seed, **options)
        scores |= {(control, name): values for control, values in controls.items()}
    return dict(sorted(scores.items(), key=lambda item: list(rules).index(item[0][1])))  # by rule, as tables are


def _tuned_rule(name: str, tuned: MapRules | None) -> dict[str, Rule]:
    """The rule of a map: its own, so that a control is not cut by what suits another; a shuffled map's is the map's."""
    found = tuned and (tuned.rules.get(name) or tuned.rules.get(split_control(name)[1]))
    return {TUNED: found} if found else {}


def _scaling_of(name: str) -> str:
    return MAP_KINDS[split_control(name)[1]].scaling


def _score_without_threshold(
    run: Run, boxed: BoxedImages, patients: np.ndarray, maps: dict[str, np.ndarray]
) -> dict[str, dict[str, Interval]]:
    geometry = (run.dataset.image_size, run.model.backbone.stride, run.model.backbone.offset)
    options = {"num_resamples": run.config.eval.num_bootstrap, "seed": run.config.seed}
    found, scores, leading = {}, {}, find_leading_map(maps)
    donors = draw_donors(patients, run.config.seed)
    for name, values in maps.items():
        control, of_map = split_control(name)
        if control and of_map != leading:  # a hundred levels each: for what answers alone
            continue
        scaling = "unit" if name == "random_map" else _scaling_of(name)
        if control == SHUFFLED:  # boxes move with their maps
            found[name] = [found[of_map][donor] for donor in donors]
        elif control == MEAN_MAP:
            found[name] = find_level_boxes(values[:1], *geometry, scaling=scaling) * len(values)
        else:
            found[name] = find_level_boxes(values, *geometry, scaling=scaling)
        overlaps = compute_best_overlaps(found[name], boxed.boxes)
        pixels = None if boxed.hearts is None else count_pixels(values, boxed.hearts, *geometry, scaling=scaling)
        scores[name] = summarize_threshold_free(overlaps, pixels, patients, **options)
    return scores


def describe_threshold_free(scores: dict[str, dict[str, Interval]]) -> dict[str, dict[str, Any]]:
    """Return what metrics.json holds of the scores without a threshold: map -> metric -> {estimate, low, high}."""
    return {
        name: {
            metric: {end: getattr(value, end) for end in ("estimate", "low", "high")} for metric, value in row.items()
        }
        for name, row in scores.items()
    }
