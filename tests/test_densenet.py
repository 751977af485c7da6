"""DenseNet-121 and -201: the table of sizes, where their cells look, and options that must not change the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_options, random_variables
from quick import jit
from receptive_fields import chain_geometry, gradient_centre

from cxa_jax.models.densenet import DenseNet, DenseNet121, DenseNet201

SMALL = (2, 1)


@pytest.mark.parametrize(
    ("create", "channels", "count", "size", "cells"),
    [
        (DenseNet121, 1024, 7_037_504, 224, 7),
        (DenseNet121, 1024, 7_037_504, 1024, 32),
        (DenseNet121, 1024, 7_037_504, 193, 6),
        (DenseNet201, 1920, 18_321_984, 224, 7),
    ],
)
def test_feature_shape(create, channels, count, size, cells):
    module = create()
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, cells, cells, channels)
    assert module.num_features == channels
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count  # as Keras counts without top


def test_geometry_by_chain():
    assert chain_geometry(DenseNet121(), 224) == (DenseNet.stride, DenseNet.offset)


def test_geometry_by_gradient():
    centre = gradient_centre(DenseNet((1, 1, 1, 1)), 544, slice(6, 11))
    np.testing.assert_allclose(centre, DenseNet.offset, atol=0.75)


def test_every_parameter_gets_a_gradient():
    module = DenseNet(SMALL)
    images = jax.random.uniform(jax.random.key(1), (4, 64, 64, 3))
    variables = random_variables(module)
    weights = jax.random.normal(jax.random.key(2), (4, 8, 8, module.num_features))

    def loss(params):
        out, _ = module.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return (out * weights).sum()

    gradients = jit(jax.grad(loss))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, path


def test_options_are_the_same_function():
    check_options(DenseNet(SMALL), 64)
