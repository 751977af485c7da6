"""A finished run without its data: network, weights, input size and normalisation, threshold, calibration.

From a workdir; `cxa_jax.weights` builds the same from a weights file.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy.special import expit

from configs import common
from cxa_jax.array_types import PyTree
from cxa_jax.calibration import Calibration
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.classification import FIXED_THRESHOLD
from cxa_jax.companion_files import Folder
from cxa_jax.data.augment import find_value_range
from cxa_jax.data.images import resize_square
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import NAMED_RULES, Rule, read_rule
from cxa_jax.models import CardioXAttentionNet, create_model
from cxa_jax.pooling import FEATURES_ONLY
from cxa_jax.run import choose_normalization
from cxa_jax.sharding import create_mesh, put_batch, replicated, split
from cxa_jax.steps import make_eval_step
from cxa_jax.workdir import flatten_config, refuse_outward_links

OUTPUTS = ("logit", "attention", "evidence")  # of the network, that predictions show
COMPUTATION_FIELDS = ("model.remat",)  # of older runs: how the network was computed, not what it is


@dataclasses.dataclass(frozen=True)
class TrainedNetwork:
    """The best state of a run, ready to look at images.

    Attributes:
      source: the workdir, or the weights file.
      folder: where the run's small files lie (`companion_files`): the workdir, or what the weights file carries of it.
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
      box_rule: how a box is read off the map that says where: as tuned on phantoms, if the run was tested with such a
        rule; else at half the map's maximum, which needs no fitted number.
    """

    source: pathlib.Path
    folder: Folder
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
    box_rule: Rule

    @property
    def image_size(self) -> int:
        """Side of the input in px."""
        return self.config.data.image_size

    @property
    def has_attention(self) -> bool:
        """True if the network learnt an attention map; else W is one constant, and class evidence says where."""
        return self.config.model.pooling not in FEATURES_ONLY

    def choose_batch_size(self, num_images: int) -> int:
        """Return how many images the network looks at at a time: at most config.eval.batch_size, or a few more."""
        return -(-min(self.config.eval.batch_size, num_images) // self.mesh.size) * self.mesh.size

    def predict(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray | None]:
        """Say of images what --mode=predict says of files: the same resizing, the same numbers.

        A batch of another size is another program to compile: give many images at once, or always as many.

        Args:
          images: uint8 [B, H, W], or B arrays uint8 [H, W] of any sizes: whole X-rays, 255 = white = dense.

        Returns:
          'logit' float32 [B]; 'score', its sigmoid, float64 [B] in [0, 1]; 'calibrated_score', by Platt's fit on the
          run's dev split, float64 [B], or None where the run has none; 'is_positive', score >= threshold, bool [B];
          'attention', W, float32 [B, h, w] in [0, 1], constant where `has_attention` is False; 'evidence' of each cell
          for the class, in logits, float32 [B, h, w].

        Raises:
          UserError: there are no images, or one is no uint8 [H, W].
        """
        images = [np.asarray(image) for image in images]
        for number, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 2 or not image.size:
                raise UserError(f"image {number} is {image.dtype} {list(image.shape)}: give grey bytes, uint8 [H, W]")
        if not images:
            raise UserError("there are no images to predict: give uint8 [B, H, W]")
        size, batch_size = self.image_size, self.choose_batch_size(len(images))
        outputs = []
        for start in range(0, len(images), batch_size):
            part = [resize_square(image, size) for image in images[start : start + batch_size]]
            batch = np.zeros((batch_size, size, size, 1), np.uint8)
            batch[: len(part), ..., 0] = part
            device = self.eval_step(self.variables, put_batch(batch, self.mesh))
            outputs.append({name: np.asarray(device[name])[: len(part)] for name in OUTPUTS})
        out = {name: np.concatenate([output[name] for output in outputs]) for name in OUTPUTS}
        score = expit(out["logit"].astype(np.float64))
        calibrated = None if self.calibration is None else self.calibration.apply(out["logit"])
        return out | {"score": score, "calibrated_score": calibrated, "is_positive": score >= self.threshold}


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
        raise UserError(
            f"--workdir={folder} holds no trained run (config.json and checkpoints/best); train one first, or give "
            "--weights=NAME of a network that is trained"
        )
    refuse_outward_links(folder)
    config = read_run_config(folder)
    model, mesh = create_trained_model(config, implementation), create_mesh()
    variables, meta = _restore(folder, describe_variables(model, mesh, config.data.image_size))
    metrics = read_metrics(folder)
    try:
        threshold, origin, calibration = _read_decision(metrics, meta)
        is_phantom = bool(metrics["phantom"]) if metrics else config.data.name == "chest_phantom"
        num_copies = int(metrics["config"].get("eval.num_copies", 1)) if metrics else config.eval.num_copies
        box_rule = _read_box_rule(metrics, config)
    except (KeyError, TypeError, AttributeError, ValueError, UserError) as error:
        raise UserError(f"{folder}/metrics.json is damaged ({error!r}); --mode=evaluate writes it again") from error
    return TrainedNetwork(
        source=folder,
        folder=folder,
        config=config.lock(),
        model=model,
        mesh=mesh,
        variables=variables,
        meta=meta,
        threshold=threshold,
        threshold_origin=origin,
        calibration=calibration,
        is_phantom=is_phantom,
        box_rule=box_rule,
        **describe_looking(config, model, mesh, num_copies),
    )


def create_trained_model(config: ConfigDict, implementation: str) -> CardioXAttentionNet:
    """Return the network of a run's config; `implementation` as in `load_trained_network`, noted in the config."""
    config.model.implementation = implementation or "auto"
    return create_model(config.model).clone(value_range=find_value_range(choose_normalization(config)))


def describe_looking(config: ConfigDict, model: CardioXAttentionNet, mesh: Mesh, num_copies: int) -> dict[str, Any]:
    """Return how the network looks at images: the attributes normalization, num_copies and eval_step."""
    normalization = choose_normalization(config)
    eval_step = jax.jit(make_eval_step(model, normalization, num_copies), out_shardings=split(mesh))
    return {"normalization": normalization, "num_copies": num_copies, "eval_step": eval_step}


def describe_variables(model: CardioXAttentionNet, mesh: Mesh, image_size: int) -> dict[str, PyTree]:
    """Return the shapes, types and shardings of {'params', 'batch_stats'}; nothing is computed or allocated."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key, images: model.init(key, images, train=False), jax.random.key(0), images)
    sharding = replicated(mesh)
    return {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes[name])
        for name in ("params", "batch_stats")
    }


def read_run_config(folder: pathlib.Path) -> ConfigDict:
    """Read `folder`/config.json; fields that the run does not know yet take their defaults.

    Raises:
      UserError: the file is damaged, or says of the network what this version does not know.
    """
    path = folder / "config.json"
    try:
        fields = flatten_config(ConfigDict(json.loads(path.read_text(encoding="utf-8"))))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return build_run_config(path, fields)


def build_run_config(path: pathlib.Path, fields: dict[str, Any]) -> ConfigDict:
    """Return the config of a run's flat fields; those that it lacks take their defaults.

    Args:
      path: of the file that they stand in, for messages.
      fields: by name, as 'train.batch_size'.

    Raises:
      UserError: a field is damaged, or says of the network what this version does not know.
    """
    for name in ("name", "model.backbone"):
        if not isinstance(fields.get(name), str):
            raise UserError(f"{path} is damaged: config.{name} is {repr(fields.get(name))[:80]}")
    config = common.get_config(fields["name"], fields["model.backbone"])
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


def _restore(folder: pathlib.Path, abstract: dict[str, PyTree]) -> tuple[PyTree, dict[str, Any]]:
    with Checkpoints(folder, "best", read_only=True) as best:
        restored = best.restore_variables(abstract)
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


def _read_box_rule(metrics: dict[str, Any] | None, config: ConfigDict) -> Rule:
    localization = (metrics or {}).get("localization") or {}
    tuned = (localization.get("tuned_rules") or {}).get("rules", {})
    found = tuned.get("evidence" if config.model.pooling in FEATURES_ONLY else "attention")
    return read_rule(found) if found else NAMED_RULES["half_max"]
