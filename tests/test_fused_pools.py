"""The fused pools against Flax': values and gradients in float64, odd sizes, ties."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import assert_same_function, random_array

from cxa_jax.models.fused_pools import avg_pool_2x2, max_pool_3x3

SIZES = [(3, 4), (5, 6), (7, 9)]

pytestmark = pytest.mark.usefixtures("float64")


def flax_max_pool(x, padding):
    return nn.max_pool(x, (3, 3), (2, 2), ((padding, padding),) * 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [0, 1])
def test_max_pool_is_flax_max_pool(size, padding):
    x = random_array(2, *size, 3)
    assert_same_function(partial(max_pool_3x3, padding=padding), partial(flax_max_pool, padding=padding), x)


def test_max_pool_of_less_than_a_window():
    assert_same_function(max_pool_3x3, partial(flax_max_pool, padding=1), random_array(2, 1, 2, 3))


@pytest.mark.parametrize("padding", [0, 1])
def test_max_pool_breaks_ties_as_xla_does(padding):
    x = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, 7, 8, 3)), jnp.float64)  # mostly ties
    assert_same_function(partial(max_pool_3x3, padding=padding), partial(flax_max_pool, padding=padding), x)


@pytest.mark.parametrize("size", SIZES)
def test_avg_pool_is_flax_avg_pool(size):
    assert_same_function(avg_pool_2x2, lambda x: nn.avg_pool(x, (2, 2), (2, 2)), random_array(2, *size, 3))
