"""The two per-epoch rules against Keras' callbacks."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from quick import jit

from cxa_jax.optimizer import (
    EarlyStopRule,
    EarlyStopState,
    PlateauRule,
    PlateauState,
    is_best,
    update_early_stop,
    update_plateau,
)

keras = pytest.importorskip("keras", reason="Keras is a test requirement")


# Keras starts from best = None and lets a first NaN become the best for ever; from infinity, NaN never improves.
# Starting its callbacks there is the one deviation; without a first NaN the two starts are the same.
START = float("inf")


class FakeOptimizer:
    learning_rate = 1.0


class FakeModel:
    """As much of a Keras model as the callbacks touch."""

    def __init__(self):
        self.optimizer = FakeOptimizer()
        self.stop_training = False
        self.saved = []

    def save_weights(self, path, overwrite=True):
        self.saved.append(path)


def draw_losses(seed: int) -> np.ndarray:
    """A falling, noisy loss with ties, steps about min_delta in size, and NaNs, the first epoch's included.

    No step is min_delta to the last digit: Keras compares in float32, where such a tie falls either way.
    """
    rng = np.random.default_rng(seed)
    losses = np.exp(-np.arange(200) / rng.uniform(5, 80)) + rng.normal(0, rng.choice([1e-4, 0.05]), 200)
    losses = np.round(losses, rng.choice([2, 3, 7]))
    losses[rng.random(200) < rng.choice([0, 0.1])] = np.nan
    if seed % 5 == 0:
        losses[0] = np.nan
    return losses


@pytest.mark.parametrize("seed", range(60))
def test_plateau_equals_keras(seed):
    losses, patience = draw_losses(seed), int(np.random.default_rng(seed).integers(1, 20))
    model, scales = FakeModel(), []
    callback = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.3, patience=patience, min_delta=1e-4, min_lr=0)
    callback.set_model(model)
    callback.on_train_begin()
    callback.best = START
    state, rule = PlateauState(), PlateauRule(0.3, patience, 1e-4)
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        scales.append(float(np.asarray(model.optimizer.learning_rate)))
        state = update_plateau(rule, state, float(loss))
        assert state.scale == pytest.approx(scales[-1], rel=1e-6), epoch
    assert min(scales) < 1 or patience > 3


@pytest.mark.parametrize("seed", range(60))
def test_early_stop_equals_keras(seed):
    losses, patience = draw_losses(seed), int(np.random.default_rng(seed).integers(2, 40))
    model = FakeModel()
    callback = keras.callbacks.EarlyStopping("val_loss", patience=patience, min_delta=0)
    callback.set_model(model)
    callback.on_train_begin()
    callback.best = START
    state, rule = EarlyStopState(), EarlyStopRule(patience, 0.0)
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        state = update_early_stop(rule, state, float(loss))
        assert state.stop == model.stop_training, epoch
        if state.stop:
            break


def test_early_stop_counts_a_first_nan_as_no_improvement():
    rule, state = EarlyStopRule(3, 0.0), EarlyStopState()
    for loss, stop in ((np.nan, False), (0.5, False), (0.6, False), (0.7, False), (0.8, True)):
        state = update_early_stop(rule, state, loss)
        assert state.stop == stop


@pytest.mark.parametrize("seed", range(20))
def test_best_checkpoint_equals_keras(seed, tmp_path):
    losses, model = draw_losses(seed), FakeModel()
    callback = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}.weights.h5"), monitor="val_loss", save_best_only=True, save_weights_only=True
    )
    callback.set_model(model)
    callback.best = START
    best, saved = np.inf, []
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        if is_best(loss, best):
            best = loss
            saved.append(str(tmp_path / f"{epoch + 1}.weights.h5"))
    assert saved == model.saved
    assert saved[-1].endswith(f"{np.nanargmin(losses) + 1}.weights.h5")  # the first of ties


def test_cuts_and_stop_fall_where_the_paper_has_them():
    """From best epoch b: the rate is cut at b + 15 and b + 30, the run ends at b + 40."""
    plateau, early_stop = PlateauState(), EarlyStopState()
    cuts, best = [], 7
    for epoch in range(1, 100):
        loss = 1 / epoch if epoch <= best else 1.0
        scale = plateau.scale
        plateau = update_plateau(PlateauRule(0.3, 15, 1e-4), plateau, loss)
        early_stop = update_early_stop(EarlyStopRule(40, 0.0), early_stop, loss)
        if plateau.scale < scale:
            cuts.append(epoch)
        if early_stop.stop:
            break
    assert cuts == [best + 15, best + 30]
    assert epoch == best + 40


@pytest.fixture(scope="module")
def optax_scales():
    """The scales of optax.contrib.reduce_on_plateau after each epoch, fed once an epoch."""

    @jit
    def find_scales(losses, patience):
        rule = optax.contrib.reduce_on_plateau(0.3, patience, rtol=0.0, atol=1e-4)

        def feed(state, loss):
            state = rule.update(jnp.zeros(1), state, value=loss)[1]
            return state, state.scale

        return jax.lax.scan(feed, rule.init(jnp.zeros(1)), losses)[1]

    return lambda losses, patience: np.asarray(find_scales(np.asarray(losses, np.float32), patience))


def plateau_scales(losses, patience, min_delta=1e-4):
    state, scales = PlateauState(), []
    for loss in losses:
        state = update_plateau(PlateauRule(0.3, patience, min_delta), state, float(loss))
        scales.append(state.scale)
    return scales


@pytest.mark.parametrize("seed", range(60))
def test_plateau_equals_optax_where_rounding_decides_nothing(seed, optax_scales):
    losses, patience = draw_losses(seed), int(np.random.default_rng(seed).integers(1, 20))
    np.testing.assert_allclose(plateau_scales(losses, patience), optax_scales(losses, patience), 1e-5, 1e-37)


def test_plateau_is_not_optax_s_in_the_last_digits_nor_at_the_ends_of_its_fields(optax_scales):
    """Why it is not used: dev losses are float64 on the host, its record is float32 on the device."""
    losses = [1.0, 0.9999 - 1e-9]  # better by min_delta and a little
    assert plateau_scales(losses, 1) == [1.0, 1.0]
    assert optax_scales(losses, 1).tolist() == [1.0, np.float32(0.3)]
    assert float(optax_scales([1.0] * 3, 1)[1]) != plateau_scales([1.0] * 3, 1)[1] == 0.3
    for factor, min_delta in ((0.3, 0.0), (1.0, 1e-4), (0.0, 1e-4)):  # min_delta 0 is Keras' own, allowed here
        with pytest.raises(ValueError):
            optax.contrib.reduce_on_plateau(factor, 1, rtol=0.0, atol=min_delta)
