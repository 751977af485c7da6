"""SGD, and the two per-epoch rules on the dev loss: plateau and early stop, as records with a pure update."""

import dataclasses
import math
from typing import NamedTuple

import optax


def create_optimizer(learning_rate: float, momentum: float) -> optax.GradientTransformation:
    """Return SGD with momentum (R12): v = momentum v + g, update = -learning_rate v.

    The plateau's scale multiplies the update, after the trace. Deviation: Keras folds the rate into the velocity, which
    differs for about ten steps after each cut (A11).
    """
    return optax.sgd(learning_rate, momentum=momentum)


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
