"""Every pooling of the table by the same sweep: a new line in POOLINGS is tested here without a new test."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxa_jax.pooling import FEATURES_ONLY, NOT_AVERAGES, NOT_SUMS, POOLINGS, pool, pool_channels, pooling_weights

B, H, W, C = 2, 4, 5, 3
EVERY_POOLING = pytest.mark.parametrize("name", sorted(POOLINGS))
EVERY_TYPE = pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
TOLERANCE = {"float64": {"rtol": 1e-12, "atol": 1e-12}, "float32": {"rtol": 1e-5, "atol": 1e-6}}
TOLERANCE["bfloat16"] = TOLERANCE["float32"]  # rounded inputs, float32 arithmetic
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
    return compile_once(POOLINGS[name])


@functools.cache  # one compilation for the names that share a function
def compile_once(function):
    return jax.jit(function)


def gradients(name):
    return make_gradients(POOLINGS[name])


@functools.cache
def make_gradients(function):
    def total(features, logits, mask=None, temperature=1.0):
        return jnp.sum(function(features, logits, mask=mask, temperature=temperature)[0])

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
def test_finite_for_any_logits(name):
    levels, scales, sizes, temperatures = (-1e3, 0.0, 1e3), (1.0, 1e3), (1e-20, 1.0, 1e20), (1e-6, 1.0, 1e6)
    extremes = itertools.product(levels, scales, sizes, temperatures, ("float32", "bfloat16"))
    for seed, (level, scale, size, temperature, dtype) in enumerate(extremes):
        features, logits = draw(seed, scale, dtype=dtype)
        features = (size * features).astype(dtype)
        logits, t = jnp.clip(logits + level, -1e3, 1e3).astype(dtype), jnp.float32(temperature)
        mask = make_mask(seed)
        pooled, p = compiled(name)(features, logits, mask=mask, temperature=t)
        for value in (pooled, p, *gradients(name)(features, logits, mask, t)):
            assert jnp.isfinite(value).all(), (level, scale, size, temperature, dtype)
        assert pooled.any()


@EVERY_POOLING
@EVERY_TYPE
@few
@given(seed=seeds)
def test_weights_are_the_gradient_with_respect_to_the_features(name, dtype, seed):
    with jax.enable_x64(True):
        features, logits = draw(seed, dtype=dtype)
        features, mask = jnp.abs(features), make_mask(seed)
        p = compiled(name)(features, logits, mask=mask)[1]
        gradient = gradients(name)(features, logits, mask)[0]
        # a gradient has its input's type: bfloat16 keeps 8 bits of it
        tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == "bfloat16" else TOLERANCE[dtype]
        np.testing.assert_allclose(gradient.astype(p.dtype), jnp.broadcast_to(p, features.shape), **tolerance)
        if dtype != "float64":
            return
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
    if name not in NOT_AVERAGES:  # theirs: test_pooling.py::test_formulas_of_lse_and_gem
        assert (p >= 0).all()
        np.testing.assert_allclose(jnp.sum(p, axis=(1, 2)), 1, rtol=1e-5)
        np.testing.assert_allclose(pooled, np.sum(p * features, axis=(1, 2)), rtol=1e-5, atol=1e-6)


@EVERY_POOLING
@EVERY_TYPE
@few
@given(seed=seeds)
def test_a_pooling_is_its_weights_and_then_an_average_with_them(name, dtype, seed):
    with jax.enable_x64(True):
        features, logits = draw(seed, dtype=dtype)
        features, mask = jnp.abs(features), make_mask(seed)  # the domain of gem
        logits = None if name in FEATURES_ONLY else logits
        pooled, p = POOLINGS[name](features, logits, mask=mask)
        weights = pooling_weights(name, features, logits, mask=mask)
        np.testing.assert_array_equal(weights, p)
        if name not in NOT_SUMS:
            np.testing.assert_allclose(pool_channels(features, weights), pooled, **TOLERANCE[dtype])
        if weights.shape[-1] == 1:
            np.testing.assert_allclose(pool(features, weights), pooled, **TOLERANCE[dtype])


@EVERY_POOLING
@EVERY_TYPE
@few
@given(seed=seeds, scale=st.sampled_from([1.0, 30.0, 1e3]))
def test_averages_stay_between_the_least_and_the_largest_cell(name, dtype, seed, scale):
    if name in NOT_AVERAGES:
        return
    with jax.enable_x64(True):
        features, logits = draw(seed, scale, dtype=dtype)
        mask = make_mask(seed)
        pooled = np.asarray(compiled(name)(features, logits, mask=mask)[0], np.float64)
        cells = np.where(np.asarray(mask)[..., None], np.asarray(features, np.float64), np.nan)
        slack = 4 * TOLERANCE[dtype]["rtol"] * np.nanmax(np.abs(cells))
        assert (np.nanmin(cells, axis=(1, 2)) - slack <= pooled).all()
        assert (pooled <= np.nanmax(cells, axis=(1, 2)) + slack).all()


@EVERY_POOLING
def test_several_maps_pool_as_each_alone(name):
    features, _ = draw(8)
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(B, H, W, 4)), jnp.float32)
    pooled, p = compiled(name)(features, logits, mask=make_mask(8))
    for m in range(4):
        alone, p_alone = compiled(name)(features, logits[..., m : m + 1], mask=make_mask(8))
        if name in FEATURES_ONLY:  # whatever the logits
            np.testing.assert_array_equal(pooled, alone)
        else:
            np.testing.assert_allclose(pooled[:, m], alone, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(p[..., m : m + 1], p_alone, rtol=1e-5, atol=1e-6)


@EVERY_POOLING
@EVERY_TYPE
@few
@given(seed=seeds)
def test_a_joint_permutation_of_the_cells_changes_nothing(name, dtype, seed):
    with jax.enable_x64(True):
        rng, logits = np.random.default_rng(seed), draw(seed, dtype=dtype)[1]
        features = jnp.asarray(rng.permutation(B * H * W * C).reshape(B, H, W, C) / 32 - 2, dtype)  # exact, no ties
        order = rng.permutation(H * W)
        pooled, p = compiled(name)(features, logits)
        shuffled = [x.reshape(B, H * W, -1)[:, order].reshape(x.shape) for x in (features, logits)]
        pooled_shuffled, p_shuffled = compiled(name)(*shuffled)
        expected = p.reshape(B, H * W, -1)[:, order].reshape(p.shape)
        np.testing.assert_allclose(pooled_shuffled, pooled, **TOLERANCE[dtype])
        np.testing.assert_allclose(p_shuffled, expected, **TOLERANCE[dtype])


@EVERY_POOLING
@few
@given(seed=seeds, columns=st.sampled_from([1, 3, W]))
def test_a_mask_equals_a_crop(name, seed, columns):
    features, logits = draw(seed)
    mask = jnp.broadcast_to(jnp.arange(W) < columns, (B, H, W))
    full = [jnp.where(mask[..., None], x, large * x) for x, large in ((features, 1e20), (logits, 1e3))]
    pooled, p = compiled(name)(*full, mask=mask)
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


def break_with_nan(features, logits, **options):
    pooled, p = POOLINGS["gap"](features, logits, **options)
    return jnp.where(jnp.max(logits) > 900, jnp.nan, pooled), p


def break_order(features, logits, mask=None, temperature=1.0):
    return POOLINGS["amm"](features, logits + jnp.arange(logits.shape[2])[None, None, :, None] / 9, mask=mask)


def break_mask(features, logits, mask=None, temperature=1.0):
    return POOLINGS["amm"](features, logits, temperature=temperature)


def break_empty_rows(features, logits, mask=None, temperature=1.0):
    z = logits if mask is None else jnp.where(mask[..., None], logits, -jnp.inf)
    p = jax.nn.softmax(z.astype(jnp.float32), axis=(1, 2))
    return jnp.sum(p * features, axis=(1, 2)), p


def break_jit(features, logits, **options):
    return POOLINGS["amm" if float(jnp.max(logits)) > 0 else "gap"](features, logits, **options)


def break_rows(features, logits, **options):
    return POOLINGS["amm"](features, logits - jnp.mean(logits), **options)


def break_weights(features, logits, **options):
    pooled, p = POOLINGS["amm"](features, logits, **options)
    return pooled, p**2 / jnp.maximum(jnp.sum(p**2, axis=(1, 2), keepdims=True), 1e-30)


def break_gradient(features, logits, **options):
    return POOLINGS["amm"](features, jax.lax.stop_gradient(logits), **options)


def break_precision(features, logits, **options):
    features, logits = (x if x.dtype == jnp.float64 else x.astype(jnp.bfloat16) for x in (features, logits))
    return POOLINGS["amm"](features, logits, **options)


def break_type(features, logits, **options):
    return tuple(x.astype(features.dtype) for x in POOLINGS["amm"](features, logits, **options))


def break_shape(features, logits, **options):
    pooled, p = POOLINGS["gap"](features, logits, **options)
    return pooled[:, None], p


def break_maps(features, logits, **options):
    return POOLINGS["amm"](features, logits - jnp.max(logits, axis=3, keepdims=True), **options)


@pytest.mark.parametrize(
    ("broken", "sweep", "arguments"),
    [
        (break_with_nan, test_finite_for_any_logits, {}),
        (break_order, test_a_joint_permutation_of_the_cells_changes_nothing, {"dtype": "float32"}),
        (break_mask, test_a_mask_equals_a_crop, {}),
        (break_empty_rows, test_rows_without_a_valid_cell_give_zeros, {}),
        (break_jit, test_jit_and_vmap_change_nothing, {}),
        (break_rows, test_jit_and_vmap_change_nothing, {}),
        (break_weights, test_weights_are_the_gradient_with_respect_to_the_features, {"dtype": "float64"}),
        (break_gradient, test_gradients_are_finite_differences, {}),
        (break_precision, test_precision_of_float32_and_bfloat16, {}),
        (break_type, test_shapes_and_types, {"dtype": "bfloat16"}),
        (break_shape, test_shapes_and_types, {"dtype": "float32"}),
        (break_maps, test_several_maps_pool_as_each_alone, {}),
    ],
)
def test_the_sweep_catches_a_broken_pooling(monkeypatch, broken, sweep, arguments):
    monkeypatch.setitem(POOLINGS, "broken", broken)
    with pytest.raises((AssertionError, jax.errors.ConcretizationTypeError)):
        sweep(name="broken", **arguments)
