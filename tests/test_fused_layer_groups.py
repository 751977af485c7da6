"""Dense layers in loops: which ones, and that zeros in the place of missing channels change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from same_function import random_dense_layers

from cxa_jax.models import fused_layer_groups
from cxa_jax.models.fused_dense_block import dense_block
from cxa_jax.models.fused_layer_groups import (
    loop_layers,
    split_layers,
    stack_layers,
    unstack_layers,
)
from cxa_jax.models.fused_norms import Affine

EPSILON = 1e-3


def make_layers(num_layers, channels, growth, **sizes):
    rng = np.random.default_rng(0)
    return random_dense_layers(
        lambda *shape: jnp.asarray(rng.normal(size=shape)), num_layers, channels, growth, **sizes
    )


@pytest.mark.parametrize(
    ("num_layers", "channels", "sizes"),  # the blocks of DenseNet-121, and the last two of DenseNet-201
    [
        (6, 64, [1] * 6),
        (12, 128, [1] * 12),
        (24, 256, [4] * 6),
        (16, 512, [8, 8]),
        (48, 256, [4] * 12),
        (32, 896, [8] * 4),
    ],
)
def test_groups_of_the_backbones(num_layers, channels, sizes):
    layers = make_layers(num_layers, channels, 32, bottleneck=1)
    groups = split_layers(layers, one_by_one=False)
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == list(layers)
    assert all(2 * group[-1].num_inputs < 3 * group[0].num_inputs for group in groups)
    assert [len(group) for group in split_layers(layers, one_by_one=True)] == [1] * num_layers


def test_the_last_group_may_be_smaller():
    assert [len(group) for group in split_layers(make_layers(6, 8, 1), one_by_one=False)] == [4, 2]


def test_a_stack_holds_each_layer_and_zeros():
    group = make_layers(3, 8, 2)
    stack, starts = stack_layers(group)
    np.testing.assert_array_equal(starts, [8, 10, 12])
    assert stack.kernel1.shape == (3, 1, 1, 12, 5) and stack.norm1.bias.shape == (3, 12)
    assert not stack.kernel1[0, :, :, 8:].any() and not stack.norm1.scale[1, 10:].any()
    for got, layer in zip(unstack_layers(stack, group), group, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, layer)


def test_kernels_in_parts_are_added_up():
    group = make_layers(3, 8, 2)
    stack, _ = stack_layers(group)
    parts = stack._replace(
        kernel1=jnp.stack([stack.kernel1, 2 * stack.kernel1], 1), kernel2=jnp.stack([stack.kernel2] * 4, 1)
    )
    for got, layer in zip(unstack_layers(parts, group), group, strict=True):
        np.testing.assert_allclose(got.kernel1, 3 * layer.kernel1, rtol=1e-6)
        np.testing.assert_allclose(got.kernel2, 4 * layer.kernel2, rtol=1e-6)
        np.testing.assert_array_equal(got.norm2.scale, layer.norm2.scale)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_single_layer_is_looped_over_as_several_are(reverse):
    def add(total, x):
        return total + x, total * x

    inputs = jnp.arange(1.0, 5.0)
    for n in (1, 4):
        carry, outputs = loop_layers(add, 2.0, inputs[:n], reverse=reverse)
        expected, expected_outputs = jax.lax.scan(add, 2.0, inputs[:n], reverse=reverse)
        np.testing.assert_array_equal(carry, expected)
        np.testing.assert_array_equal(outputs, expected_outputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("recompute", [False, True])
def test_loops_change_nothing(monkeypatch, recompute):
    """Outputs and gradients of a block of six layers, four and two of them looped, against one by one, in float64."""
    rng = np.random.default_rng(1)
    layers = make_layers(6, 8, 1)
    closing = Affine(jnp.asarray(rng.normal(size=14)), jnp.asarray(rng.normal(size=14)))
    x = jnp.asarray(rng.normal(size=(2, 4, 5, 8)))

    def run(*, looped):
        def loss(x, layers, closing):
            outputs = dense_block(x, layers, closing, EPSILON, recompute)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(outputs)), outputs

        compute = jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        assert ("while" in compute.lower(x, layers, closing).as_text()) == looped
        return compute(x, layers, closing)

    found = run(looped=True)
    monkeypatch.setattr(fused_layer_groups, "MIN_SIZE", 99)
    expected = run(looped=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)
