"""DenseNet with dilations in place of strides: the whole network's function on a finer grid, in every graph."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, slow
from receptive_fields import chain_geometry, gradient_centre
from same_function import assert_same_function, perturbed_variables, relative_errors, run

from cxa_jax.models import densenet
from cxa_jax.models.densenet import DenseNet, DenseNet121
from cxa_jax.models.fused_pools import avg_pool_to_phases, merge_phases
from cxa_jax.models.strides import avg_pool_everywhere

ONES = (1, 1, 1, 1)
STRIDES = (16, 8)


@pytest.mark.parametrize("stride", STRIDES)
def test_parameters_are_the_whole_networks(stride):
    images = jax.ShapeDtypeStruct((2, 224, 193, 3), jnp.float32)
    whole, dilated = DenseNet121(), DenseNet121(stride=stride, stride_by="dilate")
    features, variables = jax.eval_shape(lambda x: dilated.init_with_output(jax.random.key(0), x), images)
    assert variables == jax.eval_shape(whole.init, jax.random.key(0), images)
    assert features.shape == (2, 224 // stride, 193 // 32 * 32 // stride, dilated.num_features)
    assert dilated.num_features == whole.num_features


@pytest.mark.parametrize("stride", STRIDES)
def test_geometry_by_chain(stride):
    dilated = DenseNet121(stride=stride, stride_by="dilate")
    assert chain_geometry(dilated, 224) == (stride, 14) == (dilated.stride, dilated.offset)


@pytest.mark.parametrize(("stride", "cells"), [(16, slice(7, 13)), slow(8, slice(14, 26))])
def test_geometry_by_gradient(stride, cells):
    centre = gradient_centre(DenseNet(ONES, stride=stride, stride_by="dilate"), 320, cells)
    np.testing.assert_allclose(centre, 14, atol=0.75)


@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("stride", [slow(16), 8])
def test_every_kth_cell_is_the_whole_networks(implementation, stride):
    """In evaluation; the second size makes every pool drop a line."""
    whole = DenseNet((1, 1, 2, 2))
    dilated = whole.clone(stride=stride, stride_by="dilate", implementation=implementation)
    step = 32 // stride
    for size in ((64, 96), (125, 62)):
        images = jnp.asarray(np.random.default_rng(1).random((2, *size, 3)), jnp.float32)
        variables = perturbed_variables(whole, images, jnp.float32)
        expected, found = (jit(net.apply)(variables, images) for net in (whole, dilated))
        assert found.shape[1:3] == tuple(step * side for side in expected.shape[1:3])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[:, ::step, ::step] / scale, expected / scale, atol=2e-6)
        assert np.abs(found[:, 1::step, ::step] - expected).max() > 0.01 * scale  # the cells between are others


@pytest.mark.parametrize(("stride", "size"), [(8, (41, 62)), slow(16, (77, 62)), slow(8, (64, 96))])
def test_fused_equals_plain_in_float64(monkeypatch, stride, size):
    monkeypatch.setattr(densenet, "GROWTH", 8)
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(1).random((2, *size, 3)))
        num_layers = ONES if stride == 8 else (1, 1, 2, 1)
        create = partial(DenseNet, num_layers, dtype=jnp.float64, stride=stride, stride_by="dilate")
        plain, fused = (create(implementation=name) for name in ("plain", "fused"))
        variables = perturbed_variables(plain, images, jnp.float64)
        errors = relative_errors(run(fused, variables, images), run(plain, variables, images))
    assert max(jax.tree.leaves(errors)) < 1e-9


def average_by_loops(x, spacing):
    """The mean of the taps that are inside, cell by cell."""
    rows, cols = (side // (2 * spacing) * 2 * spacing for side in x.shape[1:3])
    out = np.zeros((len(x), rows, cols, x.shape[3]))
    for i, j in np.ndindex(rows, cols):
        taps = [(i + a, j + b) for a in (0, spacing) for b in (0, spacing)]
        out[:, i, j] = np.mean([x[:, a, b] for a, b in taps if a < rows and b < cols], axis=0)
    return out


@pytest.mark.parametrize("spacing", [1, 2])
def test_averages_everywhere_are_the_means_inside(spacing):
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3))
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            avg_pool_everywhere(jnp.asarray(x), spacing), average_by_loops(x, spacing), atol=1e-12
        )


def test_phases_are_the_cells_of_the_averages():
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3))
    with jax.enable_x64(True):
        phases = avg_pool_to_phases(jnp.asarray(x))
        expected = average_by_loops(x, 1)
        for i, a, b in np.ndindex(2, 2, 2):
            np.testing.assert_allclose(phases[4 * i + 2 * a + b], expected[i, a::2, b::2], atol=1e-12)
        np.testing.assert_allclose(merge_phases(phases), expected, atol=1e-12)
        twice = merge_phases(merge_phases(avg_pool_to_phases(phases)))
        np.testing.assert_allclose(twice, average_by_loops(expected, 2), atol=1e-12)
        assert_same_function(
            lambda x: merge_phases(avg_pool_to_phases(x)), lambda x: avg_pool_everywhere(x, 1), jnp.asarray(x)
        )
