"""Class weights (A12 of the paper's open questions) and Eq. (1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit
from sklearn.utils.class_weight import compute_class_weight

from cxa_jax.errors import UserError
from cxa_jax.losses import compute_class_weights, weighted_binary_cross_entropy

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
