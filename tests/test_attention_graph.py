"""The parts of the attention's graph: the 2x2 average pool of Table 3, and a pooling that copies no weights."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pooling import literal_graph

from cxa_jax import pooling

B, H, W = 2, 4, 5
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=5, deadline=None, database=None)


@few
@given(seeds, st.sampled_from([(1, 1), (1, 4), (4, 5), (7, 7)]))
def test_average_pool_leaves_padding_out_of_the_mean(seed, size):
    x = np.random.default_rng(seed).normal(size=(B, *size, 2)).astype(np.float32)
    expected = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(size[1])] for i in range(size[0])]
    pooled = pooling.average_pool_2x2_same(jnp.asarray(x))
    np.testing.assert_allclose(pooled, np.moveaxis(expected, 2, 0), rtol=1e-5, atol=1e-6)
    from_flax = nn.avg_pool(jnp.asarray(x), (2, 2), (1, 1), "SAME", count_include_pad=False)
    np.testing.assert_allclose(pooled, from_flax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@few
@given(seeds)
def test_average_pool_commutes_with_a_1x1_convolution(dtype, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = pooling.at_least_float32(jnp.asarray(rng.normal(size=(B, H, W, 16)), dtype))  # rounded inputs, float32 sums
        kernel = jnp.asarray(rng.normal(scale=0.3, size=(16, 1)), x.dtype)
        pool = pooling.average_pool_2x2_same
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(pool(x) @ kernel + 0.7, pool(x @ kernel + 0.7), **tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@few
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.25, 1.0, 6.0]))
def test_average_pool_moves_evidence_half_a_cell_up_and_left(dtype, row, column, strength):
    with jax.enable_x64(True):
        bright = jnp.zeros((1, 7, 7, 1), dtype).at[0, row, column].set(strength)
        pooled = np.asarray(pooling.average_pool_2x2_same(bright), np.float64)[0, :, :, 0] / strength
    assert pooled.sum() == 1
    assert (pooled.sum(1) @ np.arange(7), pooled.sum(0) @ np.arange(7)) == (row - 0.5, column - 0.5)


def test_gwap_does_not_copy_its_weights_to_all_channels():
    features, logits = jnp.ones((3, 7, 7, 11)), jnp.ones((3, 7, 7, 1))

    def full_size_arithmetic(function):
        lines = jax.jit(function).lower(features, logits).compile().as_text().splitlines()
        shapes = [re.search(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", line) for line in lines]
        return {m[2] for m in shapes if m and np.prod(np.array(m[1].split(","), int)) == features.size}

    assert full_size_arithmetic(pooling.gwap) <= {"parameter", "bitcast", "copy", "reshape", "transpose"}
    assert full_size_arithmetic(literal_graph) & {"multiply", "broadcast"}
