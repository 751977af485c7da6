"""Every pooling of the table by the same sweep: a new line in POOLINGS is tested here without a new test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxa_jax.pooling import FEATURES_ONLY, POOLINGS

B, H, W, C = 2, 4, 5, 3
EVERY_POOLING = pytest.mark.parametrize("name", sorted(POOLINGS))
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=5, deadline=None, database=None)


def draw(seed, scale=3.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    features = jnp.asarray(rng.normal(size=(B, H, W, C)), dtype)
    return features, jnp.asarray(rng.normal(scale=scale, size=(B, H, W, 1)), dtype)


def make_mask(seed):
    mask = np.random.default_rng(seed).random((B, H, W)) < 0.5
    mask[:, 1, 2] = True
    return jnp.asarray(mask)


def compiled(name):
    return jax.jit(POOLINGS[name])


def gradients(name):
    return make_gradients(POOLINGS[name])


@functools.cache  # one compilation for the names that share a function
def make_gradients(function):
    def total(features, logits, mask=None):
        return jnp.sum(function(features, logits, mask=mask)[0])

    return jax.jit(jax.grad(total, argnums=(0, 1)))


@EVERY_POOLING
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_shapes_and_types(name, dtype):
    with jax.enable_x64(True):
        features, logits = draw(4, dtype=dtype)
        pooled, p = jax.eval_shape(POOLINGS[name], features, None if name in FEATURES_ONLY else logits)
        assert pooled.shape == (B, C) and p.shape[:3] == (B, H, W) and p.shape[3] in (1, C)
        assert pooled.dtype == p.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


@EVERY_POOLING
@few
@given(seed=seeds, level=st.sampled_from([-1e3, 0.0, 1e3]), scale=st.sampled_from([1.0, 1e3]))
def test_finite_for_any_logits(name, seed, level, scale):
    features, logits = draw(seed, scale)
    logits = jnp.clip(logits + level, -1e3, 1e3)
    for value in (*compiled(name)(features, logits), *gradients(name)(features, logits)):
        assert jnp.isfinite(value).all()


@EVERY_POOLING
@few
@given(seed=seeds)
def test_weights_are_the_gradient_with_respect_to_the_features(name, seed):
    with jax.enable_x64(True):
        features, logits = draw(seed, dtype="float64")
        features, mask = jnp.abs(features), make_mask(seed)
        p = compiled(name)(features, logits, mask=mask)[1]
        gradient = gradients(name)(features, logits, mask)[0]
        np.testing.assert_allclose(jnp.broadcast_to(p, features.shape), gradient, rtol=1e-12, atol=1e-12)
        step = 1e-6 * np.random.default_rng(seed).normal(size=features.shape)
        up, down = (compiled(name)(features + sign * step, logits, mask=mask)[0] for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, jnp.sum(p * step, axis=(1, 2)), rtol=1e-4, atol=1e-11)


@EVERY_POOLING
@few
@given(seed=seeds)
def test_gradients_are_finite_differences(name, seed):
    with jax.enable_x64(True):
        features, logits = draw(seed, dtype="float64")
        features, mask = jnp.abs(features), make_mask(seed)
        rng = np.random.default_rng(seed)
        steps = [1e-6 * rng.normal(size=x.shape) for x in (features, logits)]
        up, down = (
            compiled(name)(features + sign * steps[0], logits + sign * steps[1], mask=mask)[0] for sign in (1, -1)
        )
        along = sum(jnp.sum(g * step) for g, step in zip(gradients(name)(features, logits, mask), steps, strict=True))
        np.testing.assert_allclose(jnp.sum(up - down) / 2, along, rtol=1e-4, atol=1e-11)


@EVERY_POOLING
@few
@given(seed=seeds)
def test_precision_of_float32_and_bfloat16(name, seed):
    with jax.enable_x64(True):
        features, logits = draw(seed, 1.0, "float64")
        features = jax.nn.sigmoid(features)
        exact = compiled(name)(features, logits)
        in_float32, in_bfloat16 = (
            compiled(name)(features.astype(dtype), logits.astype(dtype)) for dtype in ("float32", "bfloat16")
        )
        for value, reference in zip(in_float32, exact, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(in_bfloat16[0], exact[0], atol=5e-3)  # against inputs that were not rounded


@EVERY_POOLING
@few
@given(seed=seeds)
def test_pooling_is_a_weighted_average(name, seed):
    features, logits = draw(seed)
    pooled, p = compiled(name)(features, logits)
    assert (p >= 0).all()
    if name != "gem":
        np.testing.assert_allclose(jnp.sum(p, axis=(1, 2)), 1, rtol=1e-5)
    if name not in ("gem", "lse"):  # theirs: test_pooling.py::test_formulas_of_lse_and_gem
        np.testing.assert_allclose(pooled, np.sum(p * features, axis=(1, 2)), rtol=1e-5, atol=1e-6)


@EVERY_POOLING
@few
@given(seed=seeds)
def test_a_joint_permutation_of_the_cells_changes_nothing(name, seed):
    features, logits = draw(seed)
    order = np.random.default_rng(seed).permutation(H * W)
    pooled, p = compiled(name)(features, logits)
    shuffled = [x.reshape(B, H * W, 1, -1)[:, order] for x in (features, logits)]
    pooled_shuffled, p_shuffled = compiled(name)(*shuffled)
    np.testing.assert_allclose(pooled_shuffled, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(p_shuffled, p.reshape(B, H * W, 1, -1)[:, order], rtol=1e-5, atol=1e-6)


@EVERY_POOLING
@few
@given(seed=seeds, columns=st.sampled_from([1, 3, W]))
def test_a_mask_equals_a_crop(name, seed, columns):
    features, logits = draw(seed)
    mask = jnp.broadcast_to(jnp.arange(W) < columns, (B, H, W))
    pooled, p = compiled(name)(features, logits, mask=mask)
    expected, expected_p = compiled(name)(features[:, :, :columns], logits[:, :, :columns])
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(p[:, :, :columns], expected_p, rtol=1e-5, atol=1e-6)
    assert not p[:, :, columns:].any()


@EVERY_POOLING
def test_rows_without_a_valid_cell_give_zeros(name):
    features, logits = draw(5)
    mask = make_mask(5).at[0].set(False)
    for value in (*compiled(name)(features, logits, mask=mask), *gradients(name)(features, logits, mask)):
        assert not value[0].any() and jnp.isfinite(value).all()
    assert gradients(name)(features, logits, mask)[0][1].any()


@EVERY_POOLING
def test_jit_and_vmap_change_nothing(name):
    features, logits = draw(6)
    mask = make_mask(6)

    def call(features, logits, mask, temperature):
        return POOLINGS[name](features, logits, mask=mask, temperature=temperature)

    expected = call(features, logits, mask, 0.5)
    arguments = (features, logits, mask)
    mapped = jax.jit(jax.vmap(call, in_axes=(0, 0, 0, None)))(*(x[:, None] for x in arguments), 0.5)
    for got in (jax.jit(call)(*arguments, 0.5), [x[:, 0] for x in mapped]):
        for value, reference in zip(got, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["amm", "softmax", "lse", "gem"])
def test_a_temperature_must_be_positive(name):
    features, logits = draw(7)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        POOLINGS[name](features, logits, temperature=0)
