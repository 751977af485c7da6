"""A finished run as a weights file: measured, written, read again, and tried on three phantoms."""

import dataclasses
import hashlib
import logging
import pathlib
from typing import Any

import numpy as np

from cxa_jax.array_types import PyTree
from cxa_jax.companion_files import read_companions
from cxa_jax.data import chest_phantom
from cxa_jax.data.damage import naming_damage
from cxa_jax.data.datasets import Dataset, load_dataset
from cxa_jax.data.phantom import PhantomSpec
from cxa_jax.data.phantom_render import draw
from cxa_jax.errors import UserError
from cxa_jax.evaluate import evaluate_split
from cxa_jax.panels import FOOTER
from cxa_jax.sharding import put_replicated
from cxa_jax.trained_network import TrainedNetwork, load_trained_network
from cxa_jax.weights_file import read_weights, round_parameters, write_weights
from cxa_jax.weights_registry import digest_file
from cxa_jax.workdir import flatten_config, to_json, write_atomically

log = logging.getLogger(__name__)

MAX_LOGIT_DIFFERENCE = 0.01  # of any dev image, for parameters in float16
# Fields that are places on the machine that trained: their last part is kept, which says enough elsewhere.
PLACES = (
    "data.data_dir",
    "data.manual_dir",
    "data.folder.table",
    "init.keras_weights",
    "init.torch_weights",
    "init.run",
    "init.weights",
    "eval.levels_run",
)
# What the network says of these drawings stands beside the file, so that any machine can compare.
PHANTOMS = PhantomSpec(preset="hard", prevalence=0.5, label_noise=0.0, seed=0)
PHANTOM_PATIENTS, PHANTOM_PX = (0, 1, 2), 256


def export_weights(workdir: str, output: str) -> pathlib.Path:
    """Write the best state of `workdir` as `output`, a weights file, and what checks it beside it, as .json.

    Parameters are float16 if the logits of the run's dev images, which must be at hand, stay within
    MAX_LOGIT_DIFFERENCE of float32; else float32.

    Returns:
      The file.

    Raises:
      UserError: no such run, or no best state.
    """
    network = load_trained_network(workdir)
    path = pathlib.Path(output).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    told = describe_dtype(network)
    log.info("parameters are %s: %s", told["dtype"], told["dtype_reason"])
    rounded = round_parameters(network.variables, told["dtype"])
    write_weights(path, rounded, describe_network(network) | told)
    stored = read_weights(path).to_tree(rounded)
    read = dataclasses.replace(network, variables=put_replicated(stored, network.mesh))
    reference = {"file": path.name, "sha256": digest_file(path), "phantoms": describe_phantoms(read)}
    write_atomically(path.with_suffix(".json"), to_json(reference))
    log.info("%s: %.1f MB, SHA-256 %s; digest and scores of three phantoms in %s. %s", path, path.stat().st_size / 1e6,
             reference["sha256"], path.with_suffix(".json").name, FOOTER)  # fmt: skip
    return path


def describe_network(network: TrainedNetwork) -> dict[str, Any]:
    """Return what `weights_file.write_weights` asks for, but what `describe_dtype` returns."""
    config = flatten_config(network.config) | {"eval.num_copies": network.num_copies}
    config |= {field: pathlib.PurePath(config[field]).name for field in PLACES}
    progress = network.meta["progress"]
    return {
        "config": config,
        "normalization": network.normalization,
        "threshold": network.threshold,
        "threshold_origin": network.threshold_origin,
        "calibration": None if network.calibration is None else dataclasses.asdict(network.calibration),
        "is_phantom": network.is_phantom,
        "box_rule": network.box_rule._asdict(),
        "progress": {name: progress[name] for name in ("best_step", "epoch", "best_loss")},
        "fingerprint": network.meta["fingerprint"],
        "companions": read_companions(network.source),
    }


def describe_dtype(network: TrainedNetwork) -> dict[str, Any]:
    """Choose the parameters' type by the dev images, and count the views trained on.

    Returns:
      The description's 'dtype', 'dtype_reason', 'largest_logit_difference' and 'views'.
    """
    try:
        dataset = open_run_data(network)
    except UserError as error:
        log.warning("float16 cannot be measured: %s", error)
        reason = "the run's dev images were not at hand to measure float16 on"  # the file tells no path
        return {"dtype": "float32", "dtype_reason": reason, "largest_logit_difference": None, "views": None}
    rounded = put_replicated(round_parameters(network.variables, "float16"), network.mesh)
    logits = [_predict_dev(network, variables, dataset) for variables in (network.variables, rounded)]
    difference = float(np.abs(logits[0] - logits[1]).max())
    fits = difference <= MAX_LOGIT_DIFFERENCE  # False of nan, too
    reason = f"in float16 the logits of {len(logits[0])} dev images differ from float32's by {difference:.2g} at most"
    views, counts = np.unique(dataset.splits["train"].index["view"], return_counts=True)
    return {
        "dtype": "float16" if fits else "float32",
        "dtype_reason": f"{reason}, allowed are {MAX_LOGIT_DIFFERENCE:g}",
        "largest_logit_difference": difference if np.isfinite(difference) else None,
        "views": {str(view) or "unknown": int(count) for view, count in zip(views, counts, strict=True)},
    }


def open_run_data(network: TrainedNetwork) -> Dataset:
    """Open the data that a run was trained on; nothing is prepared.

    Raises:
      UserError: they are not there, or are others now.
    """
    data = network.config.data.copy_and_resolve_references().unlock()
    if network.is_phantom:
        data.name = "chest_phantom"
        with naming_damage(data):
            if not chest_phantom.create_builder(data).is_prepared():
                raise UserError(f"its phantoms are not in config.data.data_dir={data.data_dir}")
    elif data.name == "auto":
        data.name = "chestxray14"
    dataset = load_dataset(data)
    if dataset.fingerprint != network.meta["fingerprint"]:
        raise UserError(f"the data in config.data.data_dir={data.data_dir} are others than those it was trained on")
    return dataset


def _predict_dev(network: TrainedNetwork, variables: PyTree, dataset: Dataset) -> np.ndarray:
    """Return the logits of dev, float64."""
    split, num_threads = dataset.splits["dev"], network.config.data.num_threads
    batch_size = network.choose_batch_size(len(split.source))
    options = {"batch_size": batch_size, "num_threads": num_threads}
    return evaluate_split(network.eval_step, variables, split, network.mesh, **options).logit.astype(np.float64)


def draw_phantoms() -> np.ndarray:
    """Draw the three phantoms, uint8 [3, PHANTOM_PX, PHANTOM_PX]: the first image of each patient."""
    return np.stack([draw(PHANTOMS, PHANTOM_PX, (patient, 0)).image for patient in PHANTOM_PATIENTS])


def describe_phantoms(network: TrainedNetwork) -> dict[str, Any]:
    """Return how the phantoms are drawn, and what the network says of them: logits, scores, each map's mean."""
    images = draw_phantoms()
    out = network.predict(images)
    return dataclasses.asdict(PHANTOMS) | {
        "patients": PHANTOM_PATIENTS,
        "size_px": PHANTOM_PX,
        "images_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "logits": out["logit"],
        "scores": out["score"],
        "mean_attention": out["attention"].mean(axis=(1, 2)),
    }
