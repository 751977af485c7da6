"""DenseNet-121 and -201: the table of sizes, where their cells look, and options that must not change the function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_options, random_variables
from quick import jit
from receptive_fields import chain_geometry, gradient_centre
from same_function import perturbed_variables

from cxa_jax.errors import UserError
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
    assert chain_geometry(DenseNet121(), 224) == (32, 14) == (DenseNet121().stride, DenseNet121().offset)


def test_geometry_by_gradient():
    centre = gradient_centre(DenseNet((1, 1, 1, 1)), 544, slice(6, 11))
    np.testing.assert_allclose(centre, 14, atol=0.75)


@pytest.mark.parametrize(("stride", "offset", "channels"), [(16, 6, 1024), (8, 2, 512)])
def test_a_cut_network_ends_after_the_block_of_its_stride(stride, offset, channels):
    whole, cut = DenseNet121(), DenseNet121(stride=stride)
    assert chain_geometry(cut, 224) == (stride, offset) == (cut.stride, cut.offset)
    images = jax.ShapeDtypeStruct((2, 193, 224, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: cut.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, 193 // stride, 224 // stride, channels)
    assert cut.num_features == channels
    of_whole = jax.eval_shape(whole.init, jax.random.key(0), images)
    closing = f"transition{len(cut.kept_layers)}"
    for kind, tree in variables.items():
        assert tree.pop("norm") == of_whole[kind][closing]["norm"]
        assert tree == {part: of_whole[kind][part] for part in tree}


@pytest.mark.parametrize(("stride", "offset"), [(16, 6), (8, 2)])
def test_a_cut_networks_cells_look_where_it_says(stride, offset):
    centre = gradient_centre(DenseNet((1, 1, 1, 1), stride=stride), 272, slice(6, 11))
    np.testing.assert_allclose(centre, offset, atol=0.75)


def test_a_cut_network_is_relu_of_the_norm_of_the_blocks_channels():
    """Its features are those behind the whole network's norm of the transition there, given the same variables."""
    images = jax.random.uniform(jax.random.key(1), (2, 64, 64, 3))
    whole, cut = DenseNet((2, 1, 1, 1)), DenseNet((2, 1, 1, 1), stride=8)
    variables = perturbed_variables(whole, images, jnp.float32)
    _, found = whole.apply(variables, images, capture_intermediates=lambda m, _: m.path == ("transition2", "norm"))
    (normed,) = found["intermediates"]["transition2"]["norm"]["__call__"]
    mine = {kind: tree | {"norm": tree["transition2"]["norm"]} for kind, tree in variables.items()}
    np.testing.assert_allclose(cut.apply(mine, images), nn.relu(normed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "field"), [({"stride": 4}, "stride=4"), ({"stride_by": "crop"}, "stride_by='crop'")]
)
def test_other_strides_are_refused(fields, field):
    with pytest.raises(UserError, match=f"config.model.{field} is not one of"):
        jax.eval_shape(DenseNet(SMALL, **fields).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


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
