"""Folders of finished runs in a second, without a network: scores and maps are drawn, all files are the real ones."""

import pathlib

import numpy as np
import tiny

from cxa_jax.classification import describe_classification
from cxa_jax.data.datasets import Split
from cxa_jax.evaluate import Predictions
from cxa_jax.heat_maps import Rule
from cxa_jax.localization import score_controls, score_maps
from cxa_jax.localization_table import LocalizationTable, summarize_tables, write_localization
from cxa_jax.map_evaluation import describe_threshold_free, find_boxed_images
from cxa_jax.metric_writer import write_history
from cxa_jax.predictions import write_predictions
from cxa_jax.saved_maps import choose_rows, save_maps
from cxa_jax.scored_maps import MAP_KINDS, THUMBNAIL, derive_maps
from cxa_jax.threshold_free import (
    compute_best_overlaps,
    count_pixels,
    find_level_boxes,
    summarize_threshold_free,
)
from cxa_jax.thumbnail import make_thumbnails
from cxa_jax.workdir import flatten_config, to_json, write_atomically

STRIDE, OFFSET = 32, 14
NUM_RESAMPLES = 50
TUNED_RULE = Rule("percentile", 85.0, "all")
MASS = Rule("mass", 2.0, scaling="min_max", shares=(0.1, 0.9, 0.2, 0.8))


def make_test_split(num_images: int = 60) -> Split:
    """Return the test images of every fake run: two views, both sexes, several ages, some with other findings."""
    split = tiny.make_split("phantom_test", num_images, seed=5, size=tiny.SIZE)
    rng = np.random.default_rng(6)
    split.index["view"] = rng.choice(["AP", "PA"], num_images)
    split.index["age"] = rng.integers(20, 90, num_images).astype(np.int32)
    others = rng.choice(["Cardiomegaly", "Cardiomegaly|Effusion"], num_images)
    split.index["findings"] = np.where(split.index["label"] == 1, others, "No Finding")
    return split


def draw_predictions(split: Split, seed: int, effect: float, pooling: str) -> Predictions:
    """Draw logits `effect` apart, and maps; those of 'gap' are flat where it learns none."""
    rng = np.random.default_rng(seed)
    label = split.index["label"]
    logit = (rng.normal(size=len(label)) + effect * label - 1).astype(np.float32)
    maps = rng.random((len(label), 2, 2)).astype(np.float32)
    learnt = maps if pooling == "amm" else np.full_like(maps, 0.5)
    weights = learnt / learnt.sum((1, 2), keepdims=True)
    return Predictions(
        split.name,
        split.index,
        label,
        logit,
        attention=learnt,
        evidence=maps - 0.5,
        weights=weights,
        grad_cam=maps,
        cam=maps - 0.4,
    )


def write_run(
    folder: pathlib.Path, *, seed: int = 0, effect: float = 1.5, phantom: bool = True, config: dict | None = None
) -> pathlib.Path:
    """Write what --mode=evaluate leaves: predictions, metrics.json, localisation, maps, history, Fig. 3."""
    folder.mkdir(parents=True)
    settings = flatten_config(tiny.make_config(**{"seed": seed}))
    settings |= {"model.backbone": "densenet121"} | (config or {})
    split = make_test_split()
    dev_split = tiny.make_split("phantom_dev", 40, seed=7, size=tiny.SIZE)
    test = draw_predictions(split, seed, effect, settings["model.pooling"])
    dev = draw_predictions(dev_split, seed + 100, effect, settings["model.pooling"])
    for name, predictions in (("test", test), ("dev", dev)):
        table = predictions.to_table()
        write_predictions(
            folder / f"predictions_{name}.csv",
            ids=table.id,
            patients=table.patient,
            labels=table.label,
            logits=table.logit,
            scores=table.score,
            attributes=table.attributes,
        )
    options = {"num_resamples": NUM_RESAMPLES, "seed": 0}
    both = {"test": test.to_table(), "dev": dev.to_table()}
    described = {name: describe_classification(table, both["dev"], **options) for name, table in both.items()}
    boxes = score_boxes_of(split, test, described["test"]["at_dev_threshold"]["threshold"])
    write_localization(folder / "localization_test.csv", boxes)
    save_maps(folder / "maps_test.npz", test, split, choose_rows(test, find_boxed_images(split).rows), STRIDE, OFFSET)
    metrics = described | {
        "data": "chest_phantom" if phantom else "chestxray14",
        "phantom": phantom,
        "image_size": tiny.SIZE,
        "normalization": "min_max",
        "fingerprint": "0123456789abcdef",
        "train": {"num_images": 44, "num_positives": 15, "patients_shared": {"train/dev": 0}},
        "localization": describe_boxes(split, test, boxes, **options),
        "thumbnail_baseline": {
            "auroc": {"estimate": 0.7, "low": 0.6, "high": 0.8},
            "gain": {"estimate": 0.1, "low": -0.1, "high": 0.3},
            "num_train_images": 44,
        },
        "short_cuts": describe_short_cuts(),
        "checkpoint": {"step": 12, "epoch": 2, "monitored": 0.5},
        "config": settings | {"eval.num_bootstrap": NUM_RESAMPLES},
        "environment": {"commit": "abcdef0123456789"},
    }
    write_atomically(folder / "metrics.json", to_json(metrics))
    rows = [
        {"epoch": n, "train_loss": 1 / n, "dev_loss": 1.1 / n, "dev_auroc": 0.5 + n / 10, "data": "drawn"}
        for n in (1, 2, 3)
    ]
    write_history(folder / "metrics.csv", rows)
    return folder


def describe_short_cuts() -> dict:
    """Return the short cuts of metrics.json."""
    value = {"estimate": 0.7, "low": 0.6, "high": 0.8}
    box = dict.fromkeys(("heart_greyed", "heart_greyed_less_whole", "heart_alone", "heart_alone_less_whole"), value)
    row = {"view": "all", "label": "all", "num_images": 60, "num_patients": 30, "too_small": False}
    return {
        "attributes": {"known": ["view", "age"], "together": value, "network_above": value},
        "heart_box": box | {"num_boxed_patients": 14},
        "energy": {"median_box": [row | {"maps": {"attention": value}}], "own_box": []},
    }


def score_boxes_of(split: Split, test: Predictions, threshold: float) -> LocalizationTable:
    """Score the drawn maps on the true boxes under three rules, with the controls; one of "tuned" numbers drawn too."""
    boxed = find_boxed_images(split)
    patients, scores = split.index["patient"][boxed.rows], {}
    rng = np.random.default_rng(8)
    for rule, cut in {"half_max": "half_max", "wang": "wang", "phantom_tuned": TUNED_RULE}.items():
        options = {"stride": STRIDE, "offset": OFFSET, "rule": cut}
        for name, values in derive_maps(test.maps).items():
            maps = values[boxed.rows]
            controls = {"shuffled": np.roll(maps, 2, axis=0), "mean_map": np.broadcast_to(maps.mean(0), maps.shape)}
            controls["random_weights"] = rng.permuted(maps, axis=1)
            for key, cells in {
                name: maps,
                **{f"{control}_{name}": cells for control, cells in controls.items()},
            }.items():
                scores[key, rule] = score_maps(
                    cells, boxed.boxes, patients, tiny.SIZE, scaling=MAP_KINDS[name].scaling, **options
                )
        thumbnails = make_thumbnails((split.read_image(int(row)) for row in boxed.rows), (2, 2))
        scores[THUMBNAIL, rule] = score_maps(thumbnails, boxed.boxes, patients, tiny.SIZE, **options)
        controls = score_controls(boxed.boxes, patients, tiny.SIZE, (2, 2), **options)
        scores |= {(name, rule): values for name, values in controls.items()}
    return LocalizationTable(split.index["id"][boxed.rows], test.score[boxed.rows] >= threshold, scores)


def describe_boxes(split: Split, test: Predictions, boxes: LocalizationTable, **options: int) -> dict:
    """Return the localisation part of metrics.json."""
    boxed = find_boxed_images(split)
    free = {}
    for name, values in derive_maps(test.maps).items():
        maps, geometry = values[boxed.rows], (tiny.SIZE, STRIDE, OFFSET)
        scaling = MAP_KINDS[name].scaling
        overlaps = compute_best_overlaps(find_level_boxes(maps, *geometry, scaling=scaling), boxed.boxes)
        pixels = count_pixels(maps, boxed.hearts, *geometry, scaling=scaling)
        free[name] = summarize_threshold_free(overlaps, pixels, boxes.patients, **options)
    return summarize_tables([boxes], **options) | {
        "tuned_rules": {
            "rules": {"attention": TUNED_RULE._asdict(), "thumbnail": MASS._asdict(), "mean_map_cam": MASS._asdict()},
            "source": "dev hearts of this run's phantoms",
        },
        "threshold_free": {"protocol": "the protocol", "maps": describe_threshold_free(free)},
    }
