"""What a config stands for, built once: data, devices, network, jitted steps."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cxa_jax.array_types import Batch, PyTree
from cxa_jax.checkpointing import load_backbone
from cxa_jax.config_checks import check_config
from cxa_jax.data.augment import find_value_range
from cxa_jax.data.datasets import Dataset, describe_splits, load_dataset, shared_patients
from cxa_jax.data.pipeline import describe_epoch, epoch_labels, steps_per_epoch
from cxa_jax.distributed import first_alone
from cxa_jax.errors import UserError
from cxa_jax.findings import encode_findings
from cxa_jax.losses import compute_class_weights, create_loss
from cxa_jax.model_names import name_backbone
from cxa_jax.models import CardioXAttentionNet, create_model
from cxa_jax.models.initialization import make_he_normal
from cxa_jax.models.keras_import import KERAS_PREPROCESSING, load_keras_weights
from cxa_jax.models.torch_import import load_torch_weights
from cxa_jax.optimizer import create_optimizer, create_schedule, rate_at
from cxa_jax.sharding import check_batch_size, create_mesh, fetchable, put_replicated, replicated
from cxa_jax.starting_weights import load_starting_weights
from cxa_jax.steps import INIT, MomentsStep, make_eval_step, make_moments_step, make_train_step
from cxa_jax.train_state import Initialization, TrainState, trace_initialization
from cxa_jax.workdir import flatten_config

log = logging.getLogger(__name__)

# What `create_optimizer` takes of config.optimizer as it is.
OPTIMIZER_FIELDS = (
    "momentum",
    "name",
    "nesterov",
    "weight_decay",
    "clip_norm",
    "attention_rate_factor",
    "attention_weight_decay",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config and everything made from it.

    Attributes:
      config: the locked config.
      dataset: the prepared data.
      mesh: all devices.
      root_key: the one key that every random draw on the device is folded from.
      model: the network.
      schedule: the learning rate without the plateau's scale, a number or a function of the number of steps done.
      tx: the optimiser.
      normalization: of the input, as `cxa_jax.data.augment` names it; imported weights bring their own.
      class_weights: (w_neg, w_pos) of the training loss.
      train_step: jitted (state, batch, rate_scale, root_key) -> (state, metrics), the state donated. All outputs come
        out replicated, as the state goes in: a second less to compile than if that were asked for.
      eval_step: jitted, of the image alone: what an epoch ends with.
      test_step: jitted, of config.eval.num_copies copies: what a finished run is tested with.
      moments_step: jitted (params, moments, num_batches, images) -> moments, the former moments donated.
    """

    config: ConfigDict
    dataset: Dataset
    mesh: Mesh
    root_key: jax.Array
    model: CardioXAttentionNet
    schedule: float | optax.Schedule
    tx: optax.GradientTransformation
    normalization: str
    class_weights: tuple[float, float]
    train_step: Callable[[TrainState, Batch, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[Any, Any], dict[str, jax.Array]]
    test_step: Callable[[Any, Any], dict[str, jax.Array]]
    moments_step: MomentsStep

    def create_state(self) -> TrainState:
        """Draw fresh parameters, import the backbone's or what config.init.weights has; replicated over the mesh."""
        state = self.draw_state(jax.random.fold_in(self.root_key, INIT))
        imported = self._load_backbone()
        if imported is not None:
            state = state.replace(
                params=state.params | {"backbone": imported["params"]},
                batch_stats=state.batch_stats | {"backbone": imported["batch_stats"]},
            )
        if self.config.init.weights:
            fresh = {"params": state.params, "batch_stats": state.batch_stats}
            state = state.replace(**load_starting_weights(self.config, self.normalization, fresh))
        state = self._add_evaluated(state)
        copies = jax.tree.map(np.array, (state.averaged_params, state.fitted_stats))  # no buffer is donated twice
        return put_replicated(state.replace(averaged_params=copies[0], fitted_stats=copies[1]), self.mesh)

    def draw_state(self, key: jax.Array) -> TrainState:
        """Draw fresh parameters from a key: Glorot uniform (Table 3), or He normal convolutions of the backbone."""
        state = self.initialization.run(key)
        if self.config.model.kernel_init == "he_normal":
            backbone = jax.tree.map(
                lambda leaf: make_he_normal(np.asarray(leaf)) if leaf.ndim == 4 else leaf, state.params["backbone"]
            )
            state = state.replace(params=state.params | {"backbone": backbone})
        return state

    def _add_evaluated(self, state: TrainState) -> TrainState:
        """Add what is evaluated in place of parameters and running moments, equal to them at first, if asked."""
        return state.replace(
            averaged_params=state.params if self.config.optimizer.ema_decay else {},
            fitted_stats=state.batch_stats if self.config.train.recompute_moments else {},
        )

    def rate_at(self, step: int, plateau_scale: float) -> float:
        """Return the learning rate of a step, the first being 0."""
        return rate_at(self.schedule, step) * plateau_scale

    def select_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what the train step takes of a training batch, with the findings if the network has a map for each."""
        inputs = {name: batch[name] for name in ("image", "label", "mask")}
        if self.config.model.labels == "findings":
            inputs["findings"] = encode_findings(self.dataset.splits["train"].index["findings"][batch["index"]])
        return inputs

    def _load_backbone(self) -> dict[str, PyTree] | None:
        init, model = self.config.init, self.config.model
        stride = model.stride, model.stride_by
        if init.keras_weights:
            log.info("backbone from %s", init.keras_weights)
            return load_keras_weights(model.backbone, init.keras_weights, *stride)
        if init.torch_weights:
            log.info("backbone from %s", init.torch_weights)
            return load_torch_weights(model.backbone, init.torch_weights, init.torch_normalization, *stride)
        if init.run:
            return load_backbone(pathlib.Path(init.run).expanduser(), flatten_config(self.config), self.abstract_state)
        return None

    @functools.cached_property
    def initialization(self) -> Initialization:
        """The initialisation, traced once: for shapes and for numbers."""
        return trace_initialization(self.root_key, self.model, self.tx, self.config.data.image_size)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without arrays: the mould for restoring."""
        sharding, shapes = replicated(self.mesh), self._add_evaluated(self.initialization.shapes)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def create_run(config: ConfigDict, dataset: Dataset | None = None) -> Run:
    """Build the run of a config; nothing is compiled or initialised yet.

    Args:
      config: the locked config.
      dataset: to use in place of the one that the config names, such as noise for a benchmark.

    Raises:
      UserError: the config names something that is not there.
    """
    model = create_model(config.model, remat=config.train.remat)
    check_config(config, model.backbone.min_size)
    part = config.train.batch_size // config.train.accumulate_steps
    mesh = create_mesh(batch_sizes=(part, config.eval.batch_size))
    check_batch_size("config.train.batch_size", config.train.batch_size, mesh, config.train.accumulate_steps)
    check_batch_size("config.eval.batch_size", config.eval.batch_size, mesh)
    if dataset is None:
        with first_alone("data"):  # prepared and indexed once
            dataset = load_dataset(config.data)
    if config.model.labels == "findings" and dataset.name != "chestxray14":
        raise UserError(
            f"config.model.labels='findings' needs ChestX-ray14 and its fourteen findings; these data ({dataset.name}) "
            "know cardiomegaly alone: set --config.model.labels=cardiomegaly"
        )
    if config.model.labels == "findings" and not config.data.other_findings:
        log.warning(
            "config.model.labels='findings' on images with cardiomegaly or nothing at all: other findings are seen "
            "beside cardiomegaly alone. --config.data.other_findings=True (prepare again) keeps the images with others"
        )
    normalization = choose_normalization(config)
    model = model.clone(value_range=find_value_range(normalization))
    num_steps = config.train.num_epochs * steps_per_epoch(dataset.splits["train"], config.data, config.train.batch_size)
    schedule = create_schedule(config.optimizer, num_steps)
    tx = create_optimizer(schedule, **{field: config.optimizer[field] for field in OPTIMIZER_FIELDS})
    root_key = jax.random.key(config.seed)
    weights = (1.0, 1.0)
    if config.train.class_weights == "balanced":
        weights = compute_class_weights(epoch_labels(dataset.splits["train"], config.data))
    options = {name: config.train[name] for name in ("attention_negative_weight", "accumulate_steps")}
    options |= {"loss": create_loss(config.train), "ema_decay": config.optimizer.ema_decay}

    def train_step(state: TrainState, batch: Batch, rate_scale: jax.Array, root_key: jax.Array):
        # The key is an argument, so that runs of other seeds find this program in the compilation cache.
        step = make_train_step(model, tx, root_key, weights, normalization, config.augment, **options)
        return step(state, batch, rate_scale)

    def jit_eval_step(num_copies: int) -> Callable[[Any, Any], dict[str, jax.Array]]:
        return jax.jit(make_eval_step(model, normalization, num_copies), out_shardings=fetchable(mesh))

    eval_step = jit_eval_step(1)
    moments_step = make_moments_step(model, normalization)
    return Run(
        config=config,
        dataset=dataset,
        mesh=mesh,
        root_key=root_key,
        model=model,
        schedule=schedule,
        tx=tx,
        normalization=normalization,
        class_weights=weights,
        train_step=jax.jit(train_step, donate_argnums=0),
        eval_step=eval_step,
        test_step=eval_step if config.eval.num_copies == 1 else jit_eval_step(config.eval.num_copies),
        moments_step=jax.jit(moments_step, out_shardings=replicated(mesh), donate_argnums=1),
    )


def choose_normalization(config: ConfigDict) -> str:
    """Return the input normalisation: that of the imported weights if there are any (A17), else the config's."""
    if config.init.torch_weights:
        return config.init.torch_normalization
    return KERAS_PREPROCESSING[config.model.backbone] if config.init.keras_weights else config.data.normalization


def log_run(run: Run) -> None:
    """Log devices, data and parameters."""
    devices = run.mesh.devices.flat
    log.info("devices: %d x %s (%s) of %d process(es)", run.mesh.size, devices[0].device_kind, jax.default_backend(),
             jax.process_count())  # fmt: skip
    log.info("data: %s", run.dataset.description)
    log.info("%s", describe_splits(run.dataset))
    shared = ", ".join(f"{a}/{b} {count}" for (a, b), count in shared_patients(run.dataset).items())
    log.info("patients shared between splits: %s", shared)
    log.info("an epoch: %s", describe_epoch(run.dataset.splits["train"], run.config.data))
    log.info("class weights: %.4f (no finding), %.4f (cardiomegaly)", *run.class_weights)
    log.info("input normalisation: %s", run.normalization)
    backbone, pooling = name_backbone(flatten_config(run.config)), run.config.model.pooling
    log.info("model: %s + %s, %s graph", backbone, pooling, run.model.backbone.implementation)
    log.info("%s", describe_parameters(run.abstract_state))


def describe_parameters(state: TrainState) -> str:
    """Return a table of the network's parts: trainable parameters and batch-norm statistics."""
    lines = [f"{'part':<28}{'trainable':>12}{'statistics':>12}"]
    parts = [(f"{name}/{part}", name, part) for name in state.params for part in state.params[name]]
    for title, name, part in parts:
        statistics = state.batch_stats.get(name, {}).get(part, {})
        counts = (parameter_overview.count_parameters({part: tree}) for tree in (state.params[name][part], statistics))
        lines.append("{:<28}{:>12,}{:>12,}".format(title, *counts))
    totals = (parameter_overview.count_parameters(tree) for tree in (state.params, state.batch_stats))
    return "\n".join([*lines, "{:<28}{:>12,}{:>12,}".format("in all", *totals)])
