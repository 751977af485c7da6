"""A finished run without its data: network, weights, input size and normalisation, threshold, calibration."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import common
from cxa_jax.array_types import PyTree
from cxa_jax.calibration import Calibration
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.classification import FIXED_THRESHOLD
from cxa_jax.data.augment import find_value_range
from cxa_jax.errors import UserError
from cxa_jax.models import CardioXAttentionNet, create_model
from cxa_jax.pooling import FEATURES_ONLY
from cxa_jax.run import choose_normalization
from cxa_jax.sharding import create_mesh, replicated, split
from cxa_jax.steps import make_eval_step
from cxa_jax.workdir import flatten_config, refuse_outward_links

COMPUTATION_FIELDS = ("model.remat",)  # of older runs: how the network was computed, not what it is


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """The best state of a run, ready to look at images.

    Attributes:
      folder: the workdir.
      config: the run's, fields that are younger than the run at their defaults.
      model: the network.
      mesh: all devices.
      normalization: of the input, as `cxa_jax.data.augment` names it.
      variables: parameters and batch-norm statistics, replicated over the mesh.
      num_copies: of an image that the network looks at: as many as the threshold was chosen with.
      eval_step: jitted (variables, images uint8 [B, S, S, 1]) -> {'logit' [B], maps [B, h, w]}.
      meta: what was saved with the weights: config, progress, data fingerprint.
      threshold: score from which the decision is cardiomegaly.
      threshold_origin: where it comes from, in words.
      calibration: fitted on the run's dev split, or None.
      is_phantom: True if it was trained on drawings.
    """

    folder: pathlib.Path
    config: ConfigDict
    model: CardioXAttentionNet
    mesh: Mesh
    normalization: str
    variables: PyTree
    num_copies: int
    eval_step: Callable[[PyTree, Any], dict[str, jax.Array]]
    meta: dict[str, Any]
    threshold: float
    threshold_origin: str
    calibration: Calibration | None
    is_phantom: bool

    @property
    def image_size(self) -> int:
        """Side of the input in px."""
        return self.config.data.image_size

    @property
    def has_attention(self) -> bool:
        """True if the network learnt an attention map; else W is one constant, and class evidence says where."""
        return self.config.model.pooling not in FEATURES_ONLY


def load_trained_network(workdir: str, implementation: str = "") -> TrainedNetwork:
    """Load the best state of a workdir; its data set is not needed.

    Args:
      workdir: of a finished or running training.
      implementation: graph of the backbone, 'plain' or 'fused', the same function; '' takes what fits this machine.

    Raises:
      UserError: no such run, no best state, or one of a network that this version does not know.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    if not (folder / "checkpoints" / "best").is_dir() or not (folder / "config.json").is_file():
        raise UserError(f"--workdir={folder} holds no trained run (config.json and checkpoints/best); train one first")
    refuse_outward_links(folder)
    config = read_run_config(folder)
    config.model.implementation = implementation or "auto"
    mesh, normalization = create_mesh(), choose_normalization(config)
    model = create_model(config.model).clone(value_range=find_value_range(normalization))
    variables, meta = _restore(folder, model, mesh, config.data.image_size)
    metrics = read_metrics(folder)
    try:
        threshold, origin, calibration = _read_decision(metrics, meta)
        is_phantom = bool(metrics["phantom"]) if metrics else config.data.name == "chest_phantom"
        num_copies = int(metrics["config"].get("eval.num_copies", 1)) if metrics else config.eval.num_copies
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}/metrics.json is damaged ({error!r}); --mode=evaluate writes it again") from error
    return TrainedNetwork(
        folder=folder,
        config=config.lock(),
        model=model,
        mesh=mesh,
        normalization=normalization,
        variables=variables,
        num_copies=num_copies,
        eval_step=jax.jit(make_eval_step(model, normalization, num_copies), out_shardings=split(mesh)),
        meta=meta,
        threshold=threshold,
        threshold_origin=origin,
        calibration=calibration,
        is_phantom=is_phantom,
    )


def read_run_config(folder: pathlib.Path) -> ConfigDict:
    """Read `folder`/config.json; fields that the run does not know yet take their defaults.

    Raises:
      UserError: the file is damaged, or says of the network what this version does not know.
    """
    path = folder / "config.json"
    try:
        stored = ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        config = common.get_config(str(stored.name), stored.model.backbone)
        fields = flatten_config(stored)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    known = flatten_config(config)
    for field, value in fields.items():
        if field in known:
            _set_field(path, config, field, value)
        elif field.startswith("model.") and field not in COMPUTATION_FIELDS:
            raise UserError(f"{path}: config.{field} is none of this version's; use the version that trained the run")
    return config


def _set_field(path: pathlib.Path, config: ConfigDict, field: str, value: Any) -> None:
    if value is None:  # no field's value; a ConfigDict would take it
        raise UserError(f"{path} is damaged: config.{field} is null")
    try:
        config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: config.{field}={value!r}: {error}") from error


def read_metrics(folder: pathlib.Path) -> dict[str, Any] | None:
    """Return `folder`/metrics.json, or None if the run was not evaluated yet.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; --mode=evaluate writes it again") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{path} is damaged: no JSON object; --mode=evaluate writes it again")
    return metrics


def _restore(folder: pathlib.Path, model: CardioXAttentionNet, mesh: Mesh, size: int) -> tuple[PyTree, dict[str, Any]]:
    images = jnp.zeros((1, size, size, 3))
    abstract = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), dict(abstract)
    )
    with Checkpoints(folder, "best", read_only=True) as best:
        restored = best.restore_variables({"params": abstract["params"], "batch_stats": abstract["batch_stats"]})
    if restored is None:
        raise UserError(f"{folder} has no best checkpoint: no epoch ended with a finite dev loss; see metrics.csv")
    return restored


def _read_decision(metrics: dict[str, Any] | None, meta: dict[str, Any]) -> tuple[float, str, Calibration | None]:
    if metrics is None:
        return FIXED_THRESHOLD, "fixed 0.5: the run was not evaluated (no metrics.json)", None
    chosen = metrics["test"]["at_dev_threshold"]
    calibration = _read_calibration(metrics)
    if chosen is None:
        return FIXED_THRESHOLD, "fixed 0.5: dev has one class", calibration
    stale, (tested, stored) = "", (of["config"].get("train.recompute_moments", 0) for of in (metrics, meta))
    if tested != stored:
        stale = ", of other moments of batch norm than are stored: run --mode=evaluate without that change"
    if metrics["checkpoint"]["step"] != meta["progress"]["best_step"]:
        stale = ", of an older state: run --mode=evaluate"
    return chosen["threshold"], f"Youden's J on the run's dev split{stale}", calibration


def _read_calibration(metrics: dict[str, Any]) -> Calibration | None:
    """Return Platt's fit; None if the run is older than calibrations, or the fit turns the order of scores round."""
    platt = (metrics["test"].get("calibration") or {}).get("platt")
    return Calibration(platt["scale"], platt["bias"]) if platt and platt["scale"] > 0 else None
