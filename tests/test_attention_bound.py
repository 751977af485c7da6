"""config.model.attention_bound: z -> b tanh(z / b), in the network and as a formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import jit
from same_function import perturbed_variables

from cxa_jax import pooling
from cxa_jax.errors import UserError
from cxa_jax.models.amm import bound_logits
from cxa_jax.models.cxa import CardioXAttentionNet, check_model


@pytest.mark.parametrize("bound", [0.5, 4.0])
def test_values_and_gradient_are_the_formulas(bound):
    z = np.concatenate([np.random.default_rng(0).normal(0, 5, 200), [-1e4, 0, 1e4]])
    found = bound_logits(jnp.asarray(z, jnp.float32), bound)
    assert np.abs(found).max() <= bound
    np.testing.assert_allclose(found, bound * np.tanh(z / bound), rtol=1e-5, atol=1e-6)
    slope = jax.vmap(jax.grad(bound_logits), (0, None))(jnp.asarray(z, jnp.float32), bound)
    np.testing.assert_allclose(slope, 1 - np.tanh(z / bound) ** 2, rtol=1e-4, atol=1e-6)


def test_zero_bounds_nothing():
    z = jnp.arange(3.0)
    assert bound_logits(z, 0.0) is z


@pytest.mark.parametrize(("pooled", "head"), [("amm", "mlp"), ("pcam", "linear")])
def test_the_network_pools_by_the_bounded_logits(pooled, head):
    images = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))
    free = CardioXAttentionNet(tiny.BACKBONES["tiny"](stride=8), pooling=pooled, head=head)
    variables = perturbed_variables(free, images, jnp.float32)
    (_, expected), (logits, out) = (
        jit(model.apply)(variables, images) for model in (free, free.clone(attention_bound=0.7))
    )
    z = 0.7 * np.tanh(np.asarray(expected["attention_logits"], np.float64) / 0.7)
    np.testing.assert_allclose(out["attention_logits"], z, rtol=1e-5, atol=1e-6)
    assert np.abs(expected["attention_logits"]).max() > 1
    np.testing.assert_allclose(out["attention"], 1 / (1 + np.exp(-z)), rtol=1e-5)
    vector, weights = pooling.POOLINGS[pooled](out["features"], out["attention_logits"])
    np.testing.assert_allclose(out["weights"], weights, rtol=1e-4)
    np.testing.assert_allclose(out["pooled"], vector, rtol=1e-4, atol=1e-5)
    assert (weights.max((1, 2)) / weights.min((1, 2))).max() < np.exp(0.7) * (1 + 1e-5)
    np.testing.assert_allclose(free.apply(variables, vector, method="classify"), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bound", [-1.0, float("nan"), float("inf")])
def test_bounds_that_are_none_are_refused(bound):
    with pytest.raises(UserError, match="config.model.attention_bound=.* must be at least 0"):
        check_model(tiny.make_config(**{"model.attention_bound": bound}).model)


def test_a_pooling_without_attention_has_nothing_to_bound():
    with pytest.raises(UserError, match="attention_bound=2.0 needs attention, and config.model.pooling='gap' has none"):
        check_model(tiny.make_config(**{"model.attention_bound": 2.0, "model.pooling": "gap"}).model)
