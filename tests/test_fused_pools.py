"""The fused pools against Flax': values and gradients in float64, odd sizes, ties."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import assert_same_function, random_array

from cxa_jax.models.fused_pools import avg_pool_2x2, max_pool_3x3, max_pool_dilated

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


def pool_phases(x, dilation):
    """The pool on every dilation-th row and column, for each start of these."""
    out = jnp.zeros((x.shape[0], x.shape[1] - 2 * dilation, x.shape[2] - 2 * dilation, x.shape[3]), x.dtype)
    for i, j in np.ndindex(dilation, dilation):
        phase = nn.max_pool(x[:, i::dilation, j::dilation], (3, 3), (1, 1))
        out = out.at[:, i::dilation, j::dilation].set(phase)
    return out


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_dilated_max_pool_is_flax_max_pool_of_the_phases(dilation, ties):
    x = random_array(2, 9, 11, 3)
    x = jnp.round(x / 3) if ties else x
    pools = [partial(pool, dilation=dilation) for pool in (max_pool_dilated, pool_phases)]
    assert_same_function(*pools, x)


@pytest.mark.parametrize("size", SIZES)
def test_avg_pool_is_flax_avg_pool(size):
    assert_same_function(avg_pool_2x2, lambda x: nn.avg_pool(x, (2, 2), (2, 2)), random_array(2, *size, 3))
