"""The mathematics of docs/amm.md, statement by statement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, logsumexp, softmax

from cxa_jax import pooling
from cxa_jax.pooling import FEATURES_ONLY, POOLINGS

B, H, W, C = 2, 4, 5, 3
TOLERANCE = {"float64": {"rtol": 1e-12, "atol": 1e-12}, "float32": {"rtol": 1e-5, "atol": 1e-6}}
TOLERANCE["bfloat16"] = TOLERANCE["float32"]  # rounded inputs, float32 arithmetic; 5e-3 from the unrounded ones
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
COMPILED = {
    name: jax.jit(lambda x, name=name, **kw: POOLINGS[name](x, None, **kw)[0], static_argnames="fraction")
    for name in FEATURES_ONLY
}
gap, gwap = jax.jit(pooling.gap), jax.jit(pooling.gwap)
softmax_attention = jax.jit(lambda *arguments, **options: POOLINGS["softmax"](*arguments, **options)[0])
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.3, 3.0, 30.0])
few = settings(max_examples=5, deadline=None, database=None)


def draw(seed, scale=3.0, dtype="float64", num_maps=1):
    """Return features and attention logits in `dtype`, and the float64 numpy arrays that hold the same numbers."""
    rng = np.random.default_rng(seed)
    features = jnp.asarray(rng.normal(size=(B, H, W, C)), dtype)
    logits = jnp.asarray(rng.normal(scale=scale, size=(B, H, W, num_maps)), dtype)
    return features, logits, np.asarray(features, np.float64), np.asarray(logits, np.float64)


def reference_gwap(features, logits):
    attention = expit(logits[..., 0])
    return np.einsum("bhwk,bhw->bk", features, attention) / attention.sum((1, 2))[:, None]


def literal_graph(features, logits):
    """Table 3, layer by layer: the frozen convolution of ones, the product, two global averages, their ratio."""
    attention = jax.nn.sigmoid(logits)
    ones = jnp.ones((1, 1, 1, features.shape[-1]), attention.dtype)
    copied = jax.lax.conv_general_dilated(attention, ones, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(copied * features, axis=(1, 2)) / jnp.mean(copied, axis=(1, 2))


# Eq. (9) and its stable form ----------------------------------------------------------------------------------------


@DTYPES
@few
@given(seeds, scales)
def test_gwap_is_equation_9(dtype, seed, scale):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, scale, dtype)
        pooled = gwap(features, logits)
        assert pooled.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        np.testing.assert_allclose(pooled, reference_gwap(features64, logits64), **TOLERANCE[dtype])


@DTYPES
@few
@given(seeds)
def test_gwap_is_the_literal_keras_graph(dtype, seed):
    with jax.enable_x64(True):
        features, logits, *_ = draw(seed, 3.0, dtype)
        literal = literal_graph(pooling.at_least_float32(features), pooling.at_least_float32(logits))
        np.testing.assert_allclose(gwap(features, logits), literal, **TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "level"), [("float32", -90), ("bfloat16", -90), ("float16", -12)])
def test_gwap_is_defined_where_the_plain_ratio_is_nan(dtype, level):
    features = jnp.asarray(np.random.default_rng(0).normal(size=(B, H, W, C)), dtype)
    logits = jnp.full((B, H, W, 1), level, dtype)
    attention = 1 / (1 + jnp.exp(-logits))  # the sigmoid as its formula reads: exp overflows, so W rounds to zero
    assert jnp.isnan(jnp.sum(attention * features, axis=(1, 2)) / jnp.sum(attention, axis=(1, 2))).all()
    average = np.asarray(features, np.float64).mean((1, 2))
    np.testing.assert_allclose(gwap(features, logits), average, rtol=1e-5, atol=1e-6)


def test_an_epsilon_in_the_denominator_would_bias():
    features, _, features64, _ = draw(1, dtype="float32")
    attention = jax.nn.sigmoid(jnp.full((B, H, W, 1), -20.0))
    biased = jnp.sum(attention * features, axis=(1, 2)) / (jnp.sum(attention, axis=(1, 2)) + 1e-7)
    assert np.abs(biased / features64.mean((1, 2)) - 1).min() > 0.1


# Invariances and bounds ---------------------------------------------------------------------------------------------


@DTYPES
@few
@given(seeds, st.floats(-80, 80))
def test_constant_attention_is_gap(dtype, seed, level):
    with jax.enable_x64(True):
        features, _, features64, _ = draw(seed, dtype=dtype)
        pooled = gwap(features, jnp.full((B, H, W, 1), level, dtype))
        np.testing.assert_allclose(pooled, features64.mean((1, 2)), **TOLERANCE[dtype])
        np.testing.assert_allclose(gap(features), features64.mean((1, 2)), **TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.05)])
@few
@given(seeds, st.floats(1e-3, 1.0))
def test_the_level_of_the_attention_cancels(dtype, tolerance, seed, factor):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, 1.0, dtype)
        # z of factor x W, by logarithms: log1p keeps the digits that 1 - W loses. bfloat16 rounds it once more.
        log_attention = np.log(factor) + log_expit(logits64)
        scaled = jnp.asarray(log_attention - np.log1p(-np.exp(log_attention)), dtype)
        expected = reference_gwap(features64, logits64)
        np.testing.assert_allclose(gwap(features, scaled), expected, rtol=tolerance, atol=tolerance)


@DTYPES
@few
@given(seeds, scales)
def test_pooled_features_stay_in_the_hull_of_the_cells(dtype, seed, scale):
    with jax.enable_x64(True):
        features, logits, features64, _ = draw(seed, scale, dtype)
        pooled, slack = np.asarray(gwap(features, logits), np.float64), TOLERANCE[dtype]["rtol"] * 4
        assert (pooled >= features64.min((1, 2)) - slack).all() and (pooled <= features64.max((1, 2)) + slack).all()


@DTYPES
@few
@given(seeds, st.floats(-5, 5), st.floats(-5, 5))
def test_gwap_commutes_with_an_affine_map_of_each_channel(dtype, seed, scale, shift):
    with jax.enable_x64(True):
        features, logits, *_ = draw(seed, dtype=dtype)
        features = pooling.at_least_float32(features)  # the map itself must not round to bfloat16
        mapped, expected = gwap(scale * features + shift, logits), scale * gwap(features, logits) + shift
        tolerance = TOLERANCE[dtype] if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-5}  # terms up to 20 cancel
        np.testing.assert_allclose(mapped, expected, **tolerance)


def first_channel(logits, features):
    return jnp.sum(pooling.gwap(features, logits)[:, 0])


# Gradients ----------------------------------------------------------------------------------------------------------


@DTYPES
@few
@given(seeds, scales)
def test_gradient_with_respect_to_the_logits(dtype, seed, scale):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, scale, dtype)
        gradient = by_logits(logits, features)[..., 0]
        p = softmax(log_expit(logits64[..., 0]), axis=(1, 2))
        offset = features64[..., 0] - reference_gwap(features64, logits64)[:, None, None, 0]
        # a gradient has its input's type: bfloat16 keeps 8 bits of it
        tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == "bfloat16" else TOLERANCE[dtype]
        np.testing.assert_allclose(gradient, p * expit(-logits64[..., 0]) * offset, **tolerance)
        if dtype != "float64":
            return
        step = np.zeros_like(logits64)
        step[1, 2, 3] = 1e-5
        difference = reference_gwap(features64, logits64 + step) - reference_gwap(features64, logits64 - step)
        np.testing.assert_allclose(gradient[1, 2, 3], difference[1, 0] / 2e-5, rtol=1e-5, atol=1e-9)


by_attention = jax.jit(jax.grad(lambda w, features: first_channel(jnp.log(w) - jnp.log1p(-w), features)))


@DTYPES
@few
@given(seeds)
def test_gradient_with_respect_to_the_attention_is_orthogonal_to_it(dtype, seed):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, 1.0, dtype)  # where 1 - W keeps its digits
        attention = jax.nn.sigmoid(pooling.at_least_float32(logits))
        gradient = by_attention(attention, features)
        w = np.asarray(attention, np.float64)[..., 0]  # W as it was rounded
        p = w / w.sum((1, 2), keepdims=True)
        offset = features64[..., 0] - np.sum(p * features64[..., 0], axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(gradient[..., 0], p * offset / w, **TOLERANCE[dtype])
        np.testing.assert_allclose(jnp.sum(attention * gradient, axis=(1, 2)), 0, atol=TOLERANCE[dtype]["atol"])


by_logits = jax.jit(jax.grad(first_channel))


@DTYPES
@few
@given(seeds)
def test_saturated_cells_stop_learning(dtype, seed):
    with jax.enable_x64(True):
        features, logits, *_ = draw(seed, dtype=dtype)
        gradient = by_logits(logits.at[:, 0, 0].set(40.0), features)
        assert jnp.abs(gradient[:, 0, 0]).max() < 1e-15 < 1e-4 < jnp.abs(gradient[:, 1:]).max()


# The family and its limits ------------------------------------------------------------------------------------------


@DTYPES
@few
@given(seeds)
def test_shifted_logits_go_from_gap_to_softmax_attention(dtype, seed):
    with jax.enable_x64(True):
        features, logits, features64, _ = draw(seed, dtype=dtype)
        np.testing.assert_allclose(gwap(features, logits + 60), features64.mean((1, 2)), **TOLERANCE[dtype])
        for shift in (-60, 0, 60):
            shifted = logits + jnp.asarray(shift, dtype)  # rounded like any other logits: the reference takes it so
            weights = softmax(np.asarray(shifted, np.float64)[..., 0], axis=(1, 2))
            attended = np.einsum("bhwk,bhw->bk", features64, weights)
            np.testing.assert_allclose(POOLINGS["softmax"](features, shifted)[0], attended, **TOLERANCE[dtype])
            if shift == -60:
                np.testing.assert_allclose(gwap(features, shifted), attended, **TOLERANCE[dtype])


@DTYPES
@few
@given(seeds)
def test_low_temperature_picks_the_strongest_cell(dtype, seed):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, 1.0, dtype)
        strongest = logits64.reshape(B, -1).argmax(1)
        picked = features64.reshape(B, -1, C)[np.arange(B), strongest]
        logits = logits.reshape(B, -1, 1).at[np.arange(B), strongest].add(0.5).reshape(B, H, W, 1)  # no near ties
        for temperature in (1e-4, 1e-6):
            for attend in (gwap, softmax_attention):
                pooled = attend(features, logits, temperature=temperature)
                np.testing.assert_allclose(pooled, picked, **TOLERANCE[dtype])


@few
@given(seeds, st.sampled_from([1e4, 1e6]))
def test_high_temperature_gives_the_average(seed, temperature):
    features, logits, features64, _ = draw(seed, dtype="float32")
    average, slack = features64.mean((1, 2)), 40 / temperature  # 10 var F / 2 t, and more
    for pooled in (gwap(features, logits, temperature=temperature), COMPILED["lse"](features, temperature=temperature)):
        np.testing.assert_allclose(pooled, average, rtol=1e-5, atol=slack + 1e-6)
    pooled, logs = COMPILED["gem"](jnp.abs(features), temperature=temperature), np.log(np.abs(features64))
    np.testing.assert_allclose(pooled, np.exp(logs.mean((1, 2))), rtol=slack + 1e-5)


@few
@given(seeds)
def test_feature_poolings_run_from_gap_to_gmp(seed):
    features = jnp.abs(draw(seed, dtype="float32")[0]) + 0.1
    x = np.sort(np.asarray(features, np.float64).reshape(B, -1, C), axis=1)
    average, largest, largest_three = x.mean(1), x[:, -1], x[:, -3:].mean(1)
    np.testing.assert_allclose(COMPILED["gmp"](features), largest, rtol=0)
    np.testing.assert_allclose(COMPILED["gem"](features, temperature=3.0), average, rtol=1e-5)
    np.testing.assert_allclose(COMPILED["gem"](features, temperature=1e-3), largest, rtol=2e-3)
    np.testing.assert_allclose(COMPILED["lse"](features, temperature=1e3), average, rtol=0.02)
    np.testing.assert_allclose(COMPILED["lse"](features, temperature=1e-3), largest, atol=1e-3)
    np.testing.assert_allclose(COMPILED["topk"](features, fraction=1.0), average, rtol=1e-5)
    np.testing.assert_allclose(COMPILED["topk"](features, fraction=1 / (H * W)), largest, rtol=0)
    np.testing.assert_allclose(COMPILED["topk"](features, fraction=0.15), largest_three, rtol=1e-5)


lse, gem = jax.jit(POOLINGS["lse"]), jax.jit(POOLINGS["gem"])


@DTYPES
@few
@given(seeds)
def test_formulas_of_lse_and_gem(dtype, seed):
    with jax.enable_x64(True):
        features, _, x, _ = draw(seed, dtype=dtype)
        tolerance = TOLERANCE[dtype]
        pooled, p = lse(features)
        np.testing.assert_allclose(pooled, logsumexp(10 * x, axis=(1, 2), b=1 / (H * W)) / 10, **tolerance)
        np.testing.assert_allclose(p, softmax(10 * x, axis=(1, 2)), **tolerance)
        q = softmax(10 * x, axis=(1, 2))
        divergence = np.sum(q * np.log(q * H * W), axis=(1, 2))
        np.testing.assert_allclose(pooled, np.sum(q * x, axis=(1, 2)) - divergence / 10, **tolerance)
        pooled, p = gem(jnp.abs(features))
        x = np.maximum(np.abs(x), 1e-6)
        expected = np.mean(x**3, axis=(1, 2)) ** (1 / 3)
        np.testing.assert_allclose(pooled, expected, **tolerance)
        np.testing.assert_allclose(p, x**2 / (H * W * expected[:, None, None] ** 2), **tolerance)
        assert (p >= 0).all() and (np.sum(p, axis=(1, 2)) <= 1 + tolerance["rtol"]).all()


@DTYPES
@few
@given(seeds)
def test_learnt_logits_of_gated_attention_and_pcam(dtype, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        features, _, x, _ = draw(seed, dtype=dtype)
        wide = jnp.promote_types(dtype, jnp.float32)  # of the parameters
        sizes = ((C, 6), (C, 6), (6, 1), (1,))
        parameters = [jnp.asarray(rng.normal(scale=0.3, size=size), wide) for size in sizes]
        v, u, w, bias = (np.asarray(parameter, np.float64) for parameter in parameters)
        gated = pooling.gated_attention_logits(features, *parameters[:3])
        np.testing.assert_allclose(gated, (np.tanh(x @ v) * expit(x @ u)) @ w, **TOLERANCE[dtype])
        logits = pooling.pcam_logits(features, parameters[0][:, :1], parameters[3])
        expected = x @ v[:, :1] + bias
        np.testing.assert_allclose(logits, expected, **TOLERANCE[dtype])
        pooled, _ = POOLINGS["pcam"](features, logits)
        image_logit = np.asarray(pooled, np.float64) @ v[:, :1] + bias
        p = softmax(log_expit(expected), axis=(1, 2))
        np.testing.assert_allclose(image_logit, np.sum(p * expected, axis=(1, 2)), **TOLERANCE[dtype])
        leaning = image_logit - np.mean(expected, axis=(1, 2))  # the pool leans towards its own evidence
        assert (leaning >= -TOLERANCE[dtype]["atol"]).all()


@DTYPES
@few
@given(seeds)
def test_per_class_maps_pool_one_vector_each(dtype, seed):
    with jax.enable_x64(True):
        features, logits, features64, logits64 = draw(seed, dtype=dtype, num_maps=4)
        p = softmax(log_expit(logits64), axis=(1, 2))
        expected = np.einsum("bhwk,bhwc->bck", features64, p)
        np.testing.assert_allclose(gwap(features, logits), expected, **TOLERANCE[dtype])
