"""Class weights (A12 of the paper's open questions) and Eq. (1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit
from sklearn.utils.class_weight import compute_class_weight

from configs import common
from cxa_jax.errors import UserError
from cxa_jax.losses import (
    compute_class_weights,
    create_loss,
    generalized_cross_entropy,
    smoothed_binary_cross_entropy,
    weighted_binary_cross_entropy,
)

WEIGHTS = (0.5169, 15.295)


def draw(seed, scale=5.0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=64).astype(np.float32), rng.integers(0, 2, 64).astype(np.int32)


def reference(logits, labels, weights):
    logits = logits.astype(np.float64)
    return np.where(labels == 1, -weights[1] * log_expit(logits), -weights[0] * log_expit(-logits))


def test_class_weights_of_the_full_training_split():
    weights = compute_class_weights(np.repeat([0, 1], [45_450, 1_536]))
    np.testing.assert_allclose(weights, (0.5169, 15.295), rtol=1e-4)


def test_class_weights_are_those_of_scikit_learn():
    labels = (np.random.default_rng(0).random(500) < 0.2).astype(np.int32)
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    np.testing.assert_allclose(compute_class_weights(jnp.asarray(labels)), expected, rtol=1e-12)
    assert np.sum(np.take(compute_class_weights(labels), labels)) == pytest.approx(len(labels))


@pytest.mark.parametrize(("labels", "message"), [([0, 0, 0], "3 negative and 0 positive"), ([], "0 negative")])
def test_a_missing_class_is_an_error_that_names_the_cure(labels, message):
    with pytest.raises(UserError, match=f"{message}.*class_weights=none"):
        compute_class_weights(labels)


def test_other_labels_are_an_error():
    with pytest.raises(UserError, match=r"must be 0 or 1.*2"):
        compute_class_weights([0, 1, 2])


@pytest.mark.parametrize("weights", [(1.0, 1.0), WEIGHTS])
def test_loss_is_equation_1_row_by_row(weights):
    logits, labels = draw(1)
    loss = weighted_binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(logits, labels, weights), rtol=1e-5, atol=1e-6)


def test_loss_in_float64_and_from_bfloat16():
    logits, labels = draw(2)
    with jax.enable_x64(True):
        loss = weighted_binary_cross_entropy(jnp.asarray(logits, jnp.float64), jnp.asarray(labels), WEIGHTS)
        np.testing.assert_allclose(loss, reference(logits, labels, WEIGHTS), rtol=1e-12)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    loss = weighted_binary_cross_entropy(rounded, jnp.asarray(labels), WEIGHTS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(np.asarray(rounded), labels, WEIGHTS), rtol=1e-5, atol=1e-6)


def test_gradient_is_the_weighted_error_and_stays_finite():
    logits, labels = draw(3, scale=300.0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weighted_binary_cross_entropy(x, jnp.asarray(labels), WEIGHTS))))(
        logits
    )
    expected = np.take(WEIGHTS, labels) * (np.exp(log_expit(logits.astype(np.float64))) - labels)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "weights", "message"),
    [
        (jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32), (1.0, 1.0), r"must both be \[B\]"),
        (jnp.zeros(4), jnp.zeros(3, jnp.int32), (1.0, 1.0), r"\(4,\) and \(3,\)"),
        (jnp.zeros(4), jnp.zeros(4), (1.0, 1.0), "labels must be integers"),
        (jnp.zeros(4), jnp.zeros(4, jnp.int32), (1.0, 0.0), r"two positive numbers, got \(1.0, 0.0\)"),
        (jnp.zeros(4), jnp.zeros(4, jnp.int32), (1.0,), "two positive numbers"),
        (jnp.zeros(4), jnp.zeros(4, jnp.int32), (1.0, float("nan")), "two positive numbers"),
    ],
)
def test_wrong_arguments_are_named(logits, labels, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_binary_cross_entropy(logits, labels, weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_loss_is_the_cross_entropy_of_smoothed_labels(smoothing):
    with jax.enable_x64(True):
        logits, labels = draw(4)
        target = labels * (1 - smoothing) + smoothing / 2
        plain = -target * log_expit(logits.astype(float)) - (1 - target) * log_expit(-logits.astype(float))
        loss = smoothed_binary_cross_entropy(
            jnp.asarray(logits, jnp.float64), jnp.asarray(labels), WEIGHTS, smoothing=smoothing
        )
        np.testing.assert_allclose(loss, np.take(WEIGHTS, labels) * plain, rtol=1e-12, atol=1e-12)


def test_smoothed_loss_is_least_at_its_own_target():
    grid = jnp.linspace(-8, 8, 16_001)
    loss = smoothed_binary_cross_entropy(grid, jnp.ones(grid.shape, jnp.int32), smoothing=0.1)
    assert expit(float(grid[jnp.argmin(loss)])) == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("exponent", [0.01, 0.7, 1.0])
def test_generalized_loss_is_its_formula(exponent):
    with jax.enable_x64(True):
        logits, labels = draw(5)
        score = expit(np.where(labels == 1, logits, -logits).astype(float))
        loss = generalized_cross_entropy(
            jnp.asarray(logits, jnp.float64), jnp.asarray(labels), WEIGHTS, exponent=exponent
        )
        expected = np.take(WEIGHTS, labels) * (1 - score**exponent) / exponent
        np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-11)


def test_generalized_loss_lies_between_cross_entropy_and_absolute_error():
    logits, labels = draw(6, scale=2.0)
    score = expit(np.where(labels == 1, logits, -logits).astype(float))
    near_zero = generalized_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), exponent=1e-4)
    np.testing.assert_allclose(near_zero, -np.log(score), rtol=1e-3, atol=1e-4)
    at_one = generalized_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), exponent=1.0)
    np.testing.assert_allclose(at_one, 1 - score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_doubted_labels_pull_less(scale):
    logits, labels = draw(7, scale)
    score = expit(np.where(labels == 1, logits, -logits).astype(float))
    plain, robust = (
        jax.jit(jax.grad(lambda x, loss=loss: jnp.sum(loss(x, jnp.asarray(labels), WEIGHTS))))(jnp.asarray(logits))
        for loss in (weighted_binary_cross_entropy, create_loss(make_train_config("gce")))
    )
    assert np.isfinite(robust).all()
    np.testing.assert_allclose(robust, plain * score**0.7, rtol=1e-4, atol=1e-6)


def make_train_config(loss):
    config = common.get_config("test", "densenet121").train
    config.loss = loss
    return config


def test_config_names_the_loss():
    logits, labels = (jnp.asarray(x) for x in draw(8))
    expected = {
        "bce": weighted_binary_cross_entropy(logits, labels, WEIGHTS),
        "smoothed": smoothed_binary_cross_entropy(logits, labels, WEIGHTS, smoothing=0.1),
        "gce": generalized_cross_entropy(logits, labels, WEIGHTS, exponent=0.7),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(create_loss(make_train_config(name))(logits, labels, WEIGHTS), values)
    assert common.get_config("test", "densenet121").train.loss == "bce"
