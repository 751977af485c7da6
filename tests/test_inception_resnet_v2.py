"""Inception-ResNet-v2: the table of sizes, where its cells look, and options that must not change the function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_options
from receptive_fields import chain_geometry, gradient_centre

from cxa_jax.models import inception_resnet_v2
from cxa_jax.models.inception_resnet_v2 import BLOCK8, BLOCK17, BLOCK35, InceptionResNetV2, ResidualBlock

SMALL = (1, 1, 1)


@pytest.mark.parametrize(("size", "cells"), [(224, 5), (1024, 30)])
def test_feature_shape(size, cells):
    module = InceptionResNetV2()
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, cells, cells, 1536)
    assert cells == (size - 43) // 32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 54_336_736  # as Keras counts without top


def test_batch_norms_have_no_scale():
    shapes = jax.eval_shape(lambda: InceptionResNetV2().init(jax.random.key(0), jnp.zeros((1, 75, 75, 3))))
    leaves = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])]
    assert set(leaves) == {"kernel", "bias"}
    assert leaves.count("kernel") == 244


def test_residual_scale():
    # scale 0.2 adds a fifth of what scale 1 adds, to the same input
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 16))
    block = ResidualBlock(BLOCK8, 1.0, relu=False)
    variables = jax.jit(partial(block.init, train=False))(jax.random.key(1), x)
    whole = jax.jit(partial(block.apply, train=False))(variables, x) - x
    fifth = jax.jit(partial(block.clone(scale=0.2).apply, train=False))(variables, x) - x
    np.testing.assert_allclose(fifth, 0.2 * whole, atol=1e-5)
    assert np.abs(whole).max() > 0.1


def test_geometry_by_chain():
    assert chain_geometry(InceptionResNetV2(), 224) == (InceptionResNetV2.stride, InceptionResNetV2.offset)


@pytest.mark.slow  # by the chain of layers above; test_densenet.py has both
def test_geometry_by_gradient():
    centre = gradient_centre(InceptionResNetV2(num_blocks=SMALL), 544, slice(4, 11), num_images=2)
    np.testing.assert_allclose(centre, InceptionResNetV2.offset, atol=1.5)  # two more pools scatter it than elsewhere


def test_options_are_the_same_function():
    check_options(InceptionResNetV2(num_blocks=SMALL), 75)


@pytest.mark.parametrize("train", [False, True])
def test_blocks_of_a_kind_are_traced_once(monkeypatch, train):
    traced = []

    def apply_block(block, x, *, train):
        traced.append(block.branches)
        return block(x, train=train)

    net, images = InceptionResNetV2(num_blocks=(3, 2, 3)), jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    monkeypatch.setattr(inception_resnet_v2, "_apply_block", apply_block)
    jax.eval_shape(partial(net.apply, train=train, mutable=["batch_stats"]), variables, images)
    assert traced == [BLOCK35, BLOCK17, BLOCK8]  # of the third kind the last block stands for itself
