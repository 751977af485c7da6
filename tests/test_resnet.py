"""ResNet-50: the table of sizes, where its cells look, and options that must not change the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_options, random_variables
from quick import jit
from receptive_fields import chain_geometry, gradient_centre

from cxa_jax.models.resnet import ResNet, ResNet50

SMALL = (2, 1)


@pytest.mark.parametrize(("size", "cells"), [(224, 7), (1024, 32), (193, 7), (32, 1)])
def test_feature_shape(size, cells):
    module = ResNet50()
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, cells, cells, 2048)
    assert module.num_features == 2048
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 23_587_712  # as Keras counts without top


def test_every_convolution_is_biased_and_the_first_of_a_stage_strides():
    shapes = jax.eval_shape(lambda: ResNet50().init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    leaves = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])]
    assert leaves.count("kernel") == leaves.count("scale") == 53
    assert leaves.count("bias") == 2 * 53
    module = ResNet(SMALL)
    _, state = jax.eval_shape(
        lambda v: module.apply(v, jnp.zeros((1, 64, 64, 3)), capture_intermediates=True), random_variables(module)
    )
    assert state["intermediates"]["stage2_block1"]["conv1"]["__call__"][0].shape == (1, 8, 8, 128)


def test_geometry_by_chain():
    assert chain_geometry(ResNet50(), 224) == (ResNet.stride, ResNet.offset)


@pytest.mark.slow  # by the chain of layers above; test_densenet.py has both
def test_geometry_by_gradient():
    centre = gradient_centre(ResNet((1, 1, 1, 1)), 544, slice(6, 11))
    np.testing.assert_allclose(centre, ResNet.offset, atol=0.75)


def test_every_parameter_but_normed_biases_gets_a_gradient():
    module = ResNet(SMALL)
    variables = random_variables(module)
    images = jax.random.uniform(jax.random.key(1), (4, 64, 64, 3))
    weights = jax.random.normal(jax.random.key(2), (4, 8, 8, module.num_features))

    def loss(params):
        out, _ = module.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return (out * weights).sum()

    gradients = jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        is_conv_bias = path[-1].key == "bias" and "conv" in path[-2].key
        assert is_conv_bias or np.abs(gradient).max() > 0, path


def test_options_are_the_same_function():
    check_options(ResNet(SMALL), 64)


def test_parameters_stay_float32():
    shapes = jax.eval_shape(
        lambda: ResNet(SMALL, dtype=jnp.bfloat16).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
