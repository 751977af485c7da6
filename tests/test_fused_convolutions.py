"""The fused convolutions against lax: values and gradients in float64, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import assert_same_function

from cxa_jax.models import fused_convolutions as ops

SIZES = [(1, 2), (5, 6), (7, 9)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1.5, shape))


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("size", SIZES)
def test_conv_1x1_is_the_convolution(size):
    assert_same_function(ops.conv_1x1, convolve, random_array(2, *size, 6), random_array(1, 1, 6, 4, seed=1))


@pytest.mark.parametrize("size", SIZES)
def test_conv_3x3_is_the_convolution(size):
    assert_same_function(ops.conv_3x3, convolve, random_array(2, *size, 6), random_array(3, 3, 6, 4, seed=1))
