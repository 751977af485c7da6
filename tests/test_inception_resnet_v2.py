"""Inception-ResNet-v2: the table of sizes, where its cells look, and options that must not change the function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_dilated, check_options
from receptive_fields import chain_geometry, gradient_centre

from cxa_jax.errors import UserError
from cxa_jax.models import inception_resnet_v2
from cxa_jax.models.inception_resnet_v2 import BLOCK8, BLOCK17, BLOCK35, InceptionResNetV2, ResidualBlock

SMALL = (1, 1, 1)
FINER = [(stride, by) for stride in (16, 8) for by in ("cut", "dilate")]
LOST = {(32, "cut"): 43, (16, "cut"): 27, (8, "cut"): 19, (16, "dilate"): 59, (8, "dilate"): 67}  # px, of valid windows


@pytest.mark.parametrize(("size", "cells"), [(224, 5), (1024, 30)])
def test_feature_shape(size, cells):
    module = InceptionResNetV2()
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, cells, cells, 1536)
    assert cells == (size - 43) // 32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 54_336_736  # as Keras counts without top


@pytest.mark.parametrize(("stride", "by"), LOST)
def test_number_of_cells(stride, by):
    module = InceptionResNetV2(SMALL, stride=stride, stride_by=by)
    for height in (module.min_size, *np.random.default_rng(0).integers(module.min_size, 400, 4)):
        width = height + 3
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        features, _ = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
        rows, cols = ((side - LOST[stride, by]) // stride for side in (height, width))
        assert features.shape == (1, rows, cols, module.num_features) and rows > 0
    with pytest.raises(UserError, match=f"at least {module.min_size} x {module.min_size} px"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, module.min_size - 1, 224, 3)))


BEYOND_16 = ("mixed_7a", "block8_", "conv_7b")


@pytest.mark.parametrize(
    ("stride", "channels", "beyond"), [(16, 1088, BEYOND_16), (8, 320, ("mixed_6a", "block17_", *BEYOND_16))]
)
def test_a_cut_network_has_the_first_parts(stride, channels, beyond):
    module, images = InceptionResNetV2((2, 2, 2), stride=stride), jnp.zeros((1, 75, 75, 3))
    variables, whole = (
        jax.eval_shape(net.init, jax.random.key(0), images) for net in (module, InceptionResNetV2((2, 2, 2)))
    )
    assert module.num_features == channels
    assert variables == {
        kind: {name: leaves for name, leaves in tree.items() if not name.startswith(beyond)}
        for kind, tree in whole.items()
    }
    assert len(variables["params"]) == len(whole["params"]) - {16: 1 + 2 + 1, 8: 1 + 2 + 1 + 2 + 1}[stride]


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_network_has_all_variables(stride):
    module, images = InceptionResNetV2(SMALL, stride=stride, stride_by="dilate"), jnp.zeros((1, 75, 75, 3))
    variables, expected = (
        jax.eval_shape(net.init, jax.random.key(0), images) for net in (module, InceptionResNetV2(SMALL))
    )
    assert variables == expected
    assert module.num_features == 1536


@pytest.mark.parametrize(
    ("stride", "size"),
    [
        (8, (91, 107)),
        *(pytest.param(s, size, marks=pytest.mark.slow) for s in (16, 8) for size in ((75, 90), (139, 150))),
    ],
)
def test_each_kth_dilated_cell_is_the_whole_networks(stride, size):
    check_dilated(InceptionResNetV2(SMALL), stride, *size)


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


@pytest.mark.parametrize(("stride", "by", "offset"), [(32, "cut", 37), (16, "cut", 21), (8, "cut", 13)])
def test_geometry_by_chain(stride, by, offset):
    module = InceptionResNetV2(stride=stride, stride_by=by)
    assert chain_geometry(module, 224) == (module.stride, module.offset) == (stride, offset)


@pytest.mark.parametrize("stride", [16, 8])
def test_geometry_by_chain_when_dilated(stride):
    module = InceptionResNetV2((2, 2, 2), stride=stride, stride_by="dilate")
    assert chain_geometry(module, 224) == (module.stride, module.offset) == (stride, 37)


@pytest.mark.slow  # by the chain of layers above; test_densenet.py has both
@pytest.mark.parametrize(
    ("stride", "by", "size", "cells"),
    [
        (32, "cut", 544, slice(4, 11)),
        (16, "cut", 272, slice(4, 11)),
        (8, "cut", 136, slice(4, 11)),
        (16, "dilate", 544, slice(8, 22)),
        (8, "dilate", 544, slice(16, 44)),
    ],
)
def test_geometry_by_gradient(stride, by, size, cells):
    module = InceptionResNetV2(SMALL, stride=stride, stride_by=by)
    centre = gradient_centre(module, size, cells, num_images=2)
    np.testing.assert_allclose(centre, module.offset, atol=1.5)  # two more pools scatter it than elsewhere


def test_options_are_the_same_function():
    check_options(InceptionResNetV2(num_blocks=SMALL), 75)


@pytest.mark.slow
def test_options_are_the_same_function_when_dilated():
    check_options(InceptionResNetV2(SMALL, stride=8, stride_by="dilate"), 91)


@pytest.mark.parametrize(("field", "value"), [("stride", 64), ("stride_by", "pool")])
def test_other_strides_are_refused(field, value):
    with pytest.raises(UserError, match=f"config.model.{field}={value!r} is not one of"):
        jax.eval_shape(InceptionResNetV2(SMALL, **{field: value}).init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))


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
