"""The recipe of a step, and the two per-epoch rules on the dev loss: plateau and early stop, with pure updates."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cxa_jax.array_types import PyTree
from cxa_jax.errors import UserError

ATTENTION_BRANCH, SHARED_NORM = ("amm", "gate"), "norm"  # where attention is made; BN(F), which the pooling reads too


def create_schedule(config: ConfigDict, num_steps: int) -> float | optax.Schedule:
    """Return the learning rate, or what gives it of the number of steps done; the plateau's scale comes on top.

    Args:
      config: config.optimizer; reads learning_rate, schedule and warmup_steps.
      num_steps: of the whole run, at whose end 'cosine' is 0.

    Raises:
      UserError: the warm-up is as long as the run, or longer.
    """
    rate, warmup_steps = config.learning_rate, config.warmup_steps
    if warmup_steps and warmup_steps >= num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup_steps} leaves nothing of the run's {num_steps} steps to "
            f"config.optimizer.schedule={config.schedule!r}; set fewer, or a larger --config.train.num_epochs"
        )
    if config.schedule == "cosine":
        if warmup_steps:
            return optax.warmup_cosine_decay_schedule(0.0, rate, warmup_steps, num_steps)
        return optax.cosine_decay_schedule(rate, num_steps)
    return optax.warmup_constant_schedule(0.0, rate, warmup_steps) if warmup_steps else rate


def rate_at(schedule: float | optax.Schedule, step: int) -> float:
    """Return the learning rate of a step, the first being 0, without the plateau's scale."""
    return float(schedule(np.int32(step))) if callable(schedule) else schedule


def create_optimizer(
    learning_rate: float | optax.Schedule,
    momentum: float,
    *,
    name: str = "sgd",
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    attention_rate_factor: float = 1.0,
    attention_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Return SGD with momentum (R12), v = momentum v + g, update = -learning_rate v; or AdamW with beta1 = momentum.

    The plateau's scale multiplies the update, after the trace. Deviation: Keras folds the rate into the velocity, which
    differs for about ten steps after each cut (A11).

    Whatever is chosen, the state is that of the trace (or of Adam) and of the rate alone: decay, clipping and the
    attention's own factors keep none, so a run may be resumed with others.

    Args:
      learning_rate: a number, or a function of the number of steps done.
      momentum: of the trace, or Adam's beta1.
      name: 'sgd' | 'adamw'.
      nesterov: Nesterov's momentum, of either.
      weight_decay: times each kernel (not norms and biases) is added to its gradient before the trace by 'sgd', as in
        PyTorch, or to its update before the rate by 'adamw' (Loshchilov & Hutter 2019).
      clip_norm: the norm that the whole gradient is scaled down to if it is larger, before all else; 0 = never.
      attention_rate_factor: times the updates of the attention branch (`find_attention`).
      attention_weight_decay: on the kernels of the attention branch, besides `weight_decay`.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    decays = [optax.add_decayed_weights(weight_decay, find_kernels)] if weight_decay else []
    if attention_weight_decay:
        decays.append(optax.add_decayed_weights(attention_weight_decay, find_attention_kernels))
    factor = optax.identity()
    if attention_rate_factor != 1:
        factor = optax.masked(optax.scale(attention_rate_factor), find_attention)
    if name == "adamw":
        core = _surround(clip, optax.scale_by_adam(b1=momentum, nesterov=nesterov), optax.chain(*decays, factor))
    else:
        core = _surround(optax.chain(clip, *decays), optax.trace(momentum, nesterov), factor)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def _surround(
    before: optax.GradientTransformation, core: optax.GradientTransformation, after: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return optax.chain(before, core, after) with the state of `core` alone, where the others have none."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        updates, _ = before.update(updates, before.init(params), params)
        updates, state = core.update(updates, state, params)
        return after.update(updates, after.init(params), params)[0], state

    return optax.GradientTransformation(core.init, update)


def find_kernels(params: PyTree) -> PyTree:
    """Return a tree of bool, True for what is no vector: weights, but no bias, and no scale of a norm."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def find_attention(params: PyTree) -> PyTree:
    """Return a tree of bool, True for what is the attention branch's alone: not its norm, which is pooled too."""

    def is_inside(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> bool:
        name, part = path[0].key, path[1].key if len(path) > 1 else ""
        return name in ATTENTION_BRANCH and part != SHARED_NORM

    return jax.tree_util.tree_map_with_path(is_inside, params)


def find_attention_kernels(params: PyTree) -> PyTree:
    """Return a tree of bool, True for the weights of the attention branch."""
    return jax.tree.map(lambda a, b: a and b, find_kernels(params), find_attention(params))


def average_step_size(decay: float, num_steps: jax.Array) -> jax.Array:
    """Return the share of the newest parameters in their average: (1 - decay) / (1 - decay^num_steps).

    By optax.incremental_update it gives what optax.ema(decay) does with its bias taken out: step s counts as
    decay^(num_steps - s), all together 1. So the first step's share is 1, and the initial parameters have none, however
    short the run is.
    """
    return (1 - decay) / -jax.numpy.expm1(num_steps * math.log(decay))


@dataclasses.dataclass(frozen=True)
class PlateauRule:
    """Multiply the rate by `factor` after `patience` epochs without an improvement of more than `min_delta` (R13)."""

    factor: float
    patience: int
    min_delta: float


@dataclasses.dataclass(frozen=True)
class EarlyStopRule:
    """Stop after `patience` epochs without an improvement of more than `min_delta` (R14)."""

    patience: int
    min_delta: float


class PlateauState(NamedTuple):
    """`scale` of the rate, the `best` loss that counted, and the epochs waited since."""

    scale: float = 1.0
    best: float = math.inf
    num_waited: int = 0


class EarlyStopState(NamedTuple):
    """The `best` loss that counted, the epochs waited since, and whether the run is over."""

    best: float = math.inf
    num_waited: int = 0
    stop: bool = False


def update_plateau(rule: PlateauRule, state: PlateauState, dev_loss: float) -> PlateauState:
    """Return the state after an epoch; NaN is no improvement. Equal to Keras' ReduceLROnPlateau without cooldown."""
    # optax.contrib.reduce_on_plateau(factor, patience, rtol=0, atol=min_delta), fed once an epoch, is the same rule in
    # float32 on the device: an improvement within 1e-7 of min_delta falls either way there, 0.3 is told as 0.30000001,
    # and it refuses factors of 0 and 1 and a min_delta of 0, which Keras takes.
    if dev_loss + rule.min_delta < state.best:
        return state._replace(best=dev_loss, num_waited=0)
    if state.num_waited + 1 < rule.patience:
        return state._replace(num_waited=state.num_waited + 1)
    return state._replace(scale=state.scale * rule.factor, num_waited=0)


def update_early_stop(rule: EarlyStopRule, state: EarlyStopState, dev_loss: float) -> EarlyStopState:
    """Return the state after an epoch; NaN is no improvement. Equal to Keras' EarlyStopping."""
    if dev_loss + rule.min_delta < state.best:
        return EarlyStopState(best=dev_loss)
    num_waited = state.num_waited + 1
    return EarlyStopState(state.best, num_waited, stop=num_waited >= rule.patience)


def is_best(dev_loss: float, best: float) -> bool:
    """Say whether a checkpoint becomes the best: strict improvement, so the first of ties stays; NaN never."""
    return dev_loss < best
