"""The fused norms against their formulas: values and gradients in float64, ties, bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import assert_same_function, random_array

from cxa_jax.models import fused_norms as ops
from cxa_jax.models.fused_convolutions import conv_1x1, conv_3x3

EPSILON = 1e-3

pytestmark = pytest.mark.usefixtures("float64")


def reference_moments(x):
    mean = x.mean((0, 1, 2))
    return ops.Moments(mean, jnp.square(x - mean).mean((0, 1, 2)))


def reference_normalize_relu(x, moments, affine):
    return nn.relu((x - moments.mean) / jnp.sqrt(moments.var + EPSILON) * affine.scale + affine.bias)


def random_norm(channels):
    moments = ops.Moments(random_array(channels, seed=2), jnp.square(random_array(channels, seed=3)))
    return moments, ops.Affine(random_array(channels, seed=4), random_array(channels, seed=5))


@pytest.mark.parametrize("narrow", ["x", "moments", "affine"])
def test_types_may_differ(narrow):
    """With JAX_ENABLE_X64 parameters are float64, and moments of float32 images are not."""
    moments, affine = random_norm(4)
    arguments = {"x": random_array(2, 3, 5, 4), "moments": moments, "affine": affine}
    arguments[narrow] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments[narrow])
    x = arguments["x"]
    value, pull = jax.vjp(lambda *a: ops.normalize_relu(*a, EPSILON), *arguments.values())
    expected, expected_pull = jax.vjp(reference_normalize_relu, *arguments.values())
    g = random_array(*x.shape, seed=9)
    found, wanted = (value, pull(g.astype(value.dtype))), (expected, expected_pull(g.astype(expected.dtype)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    assert value.dtype == x.dtype


def test_an_affine_map_has_no_gradient_where_its_relu_is_at_zero():
    x, affine = jnp.zeros((1, 2, 2, 3)), ops.Affine(jnp.ones(3), jnp.zeros(3))
    gradients = jax.grad(lambda x, affine: ops.apply_affine(x, affine).sum(), (0, 1))(x, affine)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_moments_are_mean_and_biased_variance():
    assert_same_function(ops.compute_moments, reference_moments, random_array(2, 3, 5, 4))


def test_moments_of_a_constant_channel_are_safe():
    x = jnp.full((2, 8, 8, 3), 1000.1, jnp.float32)  # E[x^2] - E[x]^2 is rounding error of either sign
    moments, pull = jax.vjp(ops.compute_moments, x)
    assert (moments.var >= 0).all() and moments.var.dtype == jnp.float32
    assert np.isfinite(pull(jax.tree.map(jnp.ones_like, moments))[0]).all()


def test_normalize_relu_is_its_formula_in_all_three_arguments():
    def fast(x, moments, affine):
        return ops.normalize_relu(x, moments, affine, EPSILON)

    assert_same_function(fast, reference_normalize_relu, random_array(2, 3, 5, 4), *random_norm(4))


def test_normalize_is_its_formula_in_all_three_arguments():
    def fast(x, moments, affine):
        return ops.normalize(x, moments, affine, EPSILON)

    def reference(x, moments, affine):
        return (x - moments.mean) / jnp.sqrt(moments.var + EPSILON) * affine.scale + affine.bias

    assert_same_function(fast, reference, random_array(2, 3, 5, 4), *random_norm(4))


def test_standardised_once_and_scaled_is_the_norm():
    x, (_, affine) = random_array(2, 3, 5, 4), random_norm(4)
    moments = ops.compute_moments(x)
    scaled = ops.affine_relu(ops.standardize(x, moments, EPSILON), affine)
    np.testing.assert_allclose(scaled, reference_normalize_relu(x, moments, affine), atol=1e-12)


def test_affine_relu_is_its_formula_in_both_arguments():
    function = jax.custom_vjp(ops.affine_relu)
    function.defvjp(lambda *args: (ops.affine_relu(*args), args), ops.undo_affine_relu)
    assert_same_function(
        function, lambda x, a: nn.relu(x * a.scale + a.bias), random_array(2, 3, 5, 4), random_norm(4)[1]
    )
    zeros = jnp.zeros((1, 2, 2, 3))
    at_zero = ops.undo_affine_relu((zeros, ops.Affine(jnp.ones(3), jnp.zeros(3))), zeros + 1)
    assert not any(leaf.any() for leaf in jax.tree.leaves(at_zero))


def test_undone_standardisation_is_the_gradient_through_the_batch_moments():
    x, g = random_array(2, 3, 5, 4), random_array(2, 3, 5, 4, seed=1)
    x = x.at[..., 0].set(0.25)  # its variance is exactly 0, clipped: no gradient through it

    def standardize(x):
        return ops.standardize(x, ops.compute_moments(x), EPSILON)

    expected, pull = jax.vjp(standardize, x)
    sums = ops.Affine((g * expected).sum((0, 1, 2)), g.sum((0, 1, 2)))
    found = ops.undo_standardize(expected, ops.compute_moments(x), EPSILON, g, sums)
    np.testing.assert_allclose(found, pull(g)[0], rtol=1e-10, atol=1e-12)


def test_add_relu_is_relu_of_the_sum():
    assert_same_function(ops.add_relu, lambda x, y: nn.relu(x + y), *(random_array(2, 3, 5, 4, seed=s) for s in (1, 2)))


def test_folded_norm_is_the_norm():
    x, (moments, affine) = random_array(2, 3, 5, 4), random_norm(4)
    folded = ops.apply_affine(x, ops.fold_batch_norm(moments, affine, EPSILON))
    np.testing.assert_allclose(folded, reference_normalize_relu(x, moments, affine), atol=1e-12)


def test_bfloat16_keeps_moments_and_parameter_gradients_in_float32():
    x = random_array(2, 4, 4, 8).astype(jnp.bfloat16)
    affine = ops.Affine(jnp.ones(8, jnp.float32), jnp.zeros(8, jnp.float32))
    kernels = [random_array(k, k, 8, 8, seed=k).astype(jnp.float32) for k in (1, 3)]

    def loss(affine, kernels):
        moments = ops.compute_moments(x)
        assert moments.mean.dtype == moments.var.dtype == jnp.float32
        y = conv_3x3(conv_1x1(ops.normalize_relu(x, moments, affine, EPSILON), kernels[0]), kernels[1])
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    gradients = jax.grad(loss, (0, 1))(affine, kernels)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
