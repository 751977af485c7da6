"""What a config stands for, built once: data, devices, network, jitted steps."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cxa_jax.data.datasets import Dataset, describe_splits, load_dataset, shared_patients
from cxa_jax.data.pipeline import epoch_labels
from cxa_jax.errors import UserError
from cxa_jax.losses import compute_class_weights
from cxa_jax.models import CardioXAttentionNet, create_model
from cxa_jax.models.keras_import import KERAS_PREPROCESSING, load_keras_weights
from cxa_jax.optimizer import create_optimizer
from cxa_jax.sharding import check_batch_size, create_mesh, replicated, split
from cxa_jax.steps import INIT, TrainStep, make_eval_step, make_train_step
from cxa_jax.train_state import TrainState, create_train_state

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and everything made from it.

    Attributes:
      config: the locked config.
      dataset: the prepared data.
      mesh: all devices.
      root_key: the one key that every random draw on the device is folded from.
      model: the network.
      tx: the optimiser.
      normalization: of the input, as `cxa_jax.data.augment` names it; imported weights bring their own.
      class_weights: (w_neg, w_pos) of the training loss.
      train_step: jitted, the state donated.
      eval_step: jitted.
    """

    config: ConfigDict
    dataset: Dataset
    mesh: Mesh
    root_key: jax.Array
    model: CardioXAttentionNet
    tx: optax.GradientTransformation
    normalization: str
    class_weights: tuple[float, float]
    train_step: TrainStep
    eval_step: Callable[[Any, Any], dict[str, jax.Array]]

    def create_state(self) -> TrainState:
        """Draw fresh parameters (Glorot uniform), import the backbone's if asked; replicated over the mesh."""
        key = jax.random.fold_in(self.root_key, INIT)
        state = create_train_state(key, self.model, self.tx, self.config.data.image_size)
        if self.config.init.keras_weights:
            imported = load_keras_weights(self.config.model.backbone, self.config.init.keras_weights)
            state = state.replace(
                params=state.params | {"backbone": imported["params"]},
                batch_stats=state.batch_stats | {"backbone": imported["batch_stats"]},
            )
        return jax.device_put(state, replicated(self.mesh))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without arrays: the mould for restoring."""
        key = jax.random.fold_in(self.root_key, INIT)
        create = functools.partial(
            create_train_state, model=self.model, tx=self.tx, image_size=self.config.data.image_size
        )
        sharding = replicated(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(create, key)
        )


def create_run(config: ConfigDict) -> Run:
    """Build the run of a config; nothing is compiled or initialised yet.

    Raises:
      UserError: the config names something that is not there.
    """
    mesh = create_mesh()
    check_batch_size("config.train.batch_size", config.train.batch_size, mesh)
    check_batch_size("config.eval.batch_size", config.eval.batch_size, mesh)
    model = create_model(config.model)
    dataset = load_dataset(config.data)
    normalization = choose_normalization(config)
    tx = create_optimizer(config.optimizer.learning_rate, config.optimizer.momentum)
    root_key = jax.random.key(config.seed)
    weights = (1.0, 1.0)
    if config.train.class_weights == "balanced":
        weights = compute_class_weights(epoch_labels(dataset.splits["train"], config.data))
    train_step = make_train_step(model, tx, root_key, weights, normalization, config.augment)
    eval_step = make_eval_step(model, normalization)
    return Run(
        config=config,
        dataset=dataset,
        mesh=mesh,
        root_key=root_key,
        model=model,
        tx=tx,
        normalization=normalization,
        class_weights=weights,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=replicated(mesh)),
        eval_step=jax.jit(eval_step, out_shardings=split(mesh)),
    )


def choose_normalization(config: ConfigDict) -> str:
    """Return the input normalisation: that of the imported weights if there are any (A17), else the config's.

    Raises:
      UserError: 'imagenet' without imported weights, or a name that is none.
    """
    if config.init.keras_weights:
        return KERAS_PREPROCESSING[config.model.backbone]
    if config.data.normalization not in ("min_max", "div255"):
        raise UserError(
            f"config.data.normalization={config.data.normalization!r} is not one of min_max, div255 "
            "(ImageNet's own comes with --config.init.keras_weights=FILE)"
        )
    return config.data.normalization


def log_run(run: Run) -> None:
    """Log devices, data and parameters."""
    devices = jax.devices()
    log.info("devices: %d x %s (%s)", len(devices), devices[0].device_kind, jax.default_backend())
    log.info("data: %s", run.dataset.description)
    log.info("%s", describe_splits(run.dataset))
    shared = ", ".join(f"{a}/{b} {count}" for (a, b), count in shared_patients(run.dataset).items())
    log.info("patients shared between splits: %s", shared)
    log.info("class weights: %.4f (no finding), %.4f (cardiomegaly)", *run.class_weights)
    log.info("input normalisation: %s", run.normalization)
    backbone, pooling = run.config.model.backbone, run.config.model.pooling
    params = run.abstract_state.params
    sizes = {name: parameter_overview.count_parameters(params[name]) for name in params}
    log.info(
        "model: %s + %s, %s graph; trainable parameters: %s, in all %s",
        backbone,
        pooling,
        run.model.backbone.implementation,
        ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        f"{sum(sizes.values()):,}",
    )
