"""One run of an ablation, in its own process: train, test, and keep what is needed to compare it with the others."""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cxa_jax.ablation_arms import name_iou
from cxa_jax.atomic_files import replace_when_written
from cxa_jax.console import log_to_console
from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.evaluate import Predictions
from cxa_jax.localization import score_controls, score_maps
from cxa_jax.map_evaluation import find_boxed_images
from cxa_jax.outputs import predict_split, restore_best
from cxa_jax.run import Run, create_run
from cxa_jax.sharding import put_batch, replicated
from cxa_jax.train import train_and_evaluate
from cxa_jax.workdir import describe_environment, flatten_config, to_json, write_atomically

SCORES = "ablation_scores.npz"
NUM_WARMUP, NUM_ROUNDS = 2, 15


def train_member(config: ConfigDict, workdir: str, rules: Sequence[str]) -> None:
    """Train and test one run as the main job does, then write its scores of each test image to `workdir`.

    A run that is trained is not trained again, but tested: so rules may be added later.
    """
    log_to_console()
    start = time.perf_counter()
    train_and_evaluate(config, workdir)
    wall_s = time.perf_counter() - start
    folder = pathlib.Path(workdir)
    run = create_run(config)
    variables, meta = restore_best(run, folder)
    test = predict_split(run, variables, "test", folder)
    columns = {name: test.index[name] for name in ("id", "patient")} | {"label": test.label, "logit": test.logit}
    columns |= score_weights(run, test, rules)
    facts = {
        "config": flatten_config(config),
        "fingerprint": run.dataset.fingerprint,
        "description": run.dataset.description,
        "best_epoch": meta["progress"]["epoch"],
        "wall_s": wall_s,
        "environment": describe_environment(),
    }
    save_scores(folder / SCORES, columns, facts)


def score_weights(run: Run, test: Predictions, rules: Sequence[str]) -> dict[str, np.ndarray]:
    """Score the pooling's own map p of every boxed positive, and the controls that look at no image.

    p is scaled by its maximum, not stretched: a constant p stays constant, so plain averaging points as chance does and
    has no box.

    Args:
      run: the run.
      test: its predictions on the test split.
      rules: threshold rules; the IoU alone depends on them.

    Returns:
      `boxed_patient` [K] and, for the map and each control, `MAP/METRIC` [K]: pointing, energy_ratio, and `name_iou` of
      each rule; nan where a control defines none. K = 0 where no positive has a box.
    """
    boxed = find_boxed_images(run.dataset.splits[test.split])
    patients = test.index["patient"][boxed.rows]
    columns = {"boxed_patient": patients}
    if not len(boxed.rows):
        return columns
    size, maps = run.dataset.image_size, test.weights[boxed.rows]
    options = {"stride": run.model.backbone.stride, "offset": run.model.backbone.offset, "scaling": "positive"}
    for rule in rules:
        scored = {"weights": score_maps(maps, boxed.boxes, patients, size, rule=rule, **options)}
        scored |= score_controls(
            boxed.boxes, patients, size, maps.shape[1:], rule=rule, seed=run.config.seed, **options
        )
        for name, scores in scored.items():
            fields = {"pointing": scores.pointing, "energy_ratio": scores.energy_ratio, name_iou(rule): scores.iou}
            columns |= {f"{name}/{metric}": np.asarray(values, np.float64) for metric, values in fields.items()}
    return columns


def save_scores(path: pathlib.Path, columns: Mapping[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays and facts as one .npz, all or nothing."""
    with replace_when_written(path) as neighbour, neighbour.open("wb") as file:
        np.savez_compressed(file, facts=np.array(to_json(facts)), **columns)


def load_scores(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what `save_scores` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        columns = dict(archive)
    return columns, json.loads(str(columns.pop("facts")))


def measure_step_times(configs: Mapping[str, ConfigDict], path: str) -> None:
    """Time the train step of every config in turn, round by round, on one batch; write {name: seconds of each round}.

    Interleaved, so that what else the machine does falls on all of them alike.
    """
    log_to_console()
    calls = {name: _make_step_call(create_run(config)) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(NUM_WARMUP + NUM_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= NUM_WARMUP:
                seconds[name].append(time.perf_counter() - start)
    flat = {name: flatten_config(config) for name, config in configs.items()}
    measured = {"seconds": seconds, "configs": flat, "environment": describe_environment()}
    write_atomically(pathlib.Path(path), to_json(measured))


def _make_step_call(run: Run):
    config = run.config
    batch_size = config.train.batch_size
    iterator = make_train_iterator(run.dataset.splits["train"], config.data, batch_size=batch_size, seed=config.seed)
    batch = next(iterator)
    on_device = put_batch(run.select_inputs(batch), run.mesh)
    rate_scale = jax.device_put(np.float32(0), replicated(run.mesh))  # the same arithmetic, and nothing diverges
    state = run.create_state()

    def call() -> None:
        nonlocal state
        state, metrics = run.train_step(state, on_device, rate_scale, run.root_key)
        jax.block_until_ready((state, metrics))

    return call
