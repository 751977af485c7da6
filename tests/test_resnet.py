"""ResNet-50: the table of sizes, where its cells look, and options that must not change the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import check_dilated, check_options, random_variables
from quick import jit
from receptive_fields import chain_geometry, gradient_centre

from cxa_jax.errors import UserError
from cxa_jax.models.resnet import ResNet, ResNet50

SMALL, SHALLOW = (2, 1), (1, 1, 1, 1)
FINER = [(stride, by) for stride in (16, 8) for by in ("cut", "dilate")]


@pytest.mark.parametrize(("size", "cells"), [(224, 7), (1024, 32), (193, 7), (32, 1)])
def test_feature_shape(size, cells):
    module = ResNet50()
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, cells, cells, 2048)
    assert module.num_features == 2048
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 23_587_712  # as Keras counts without top


@pytest.mark.parametrize(("stride", "channels", "beyond"), [(16, 1024, ("stage4",)), (8, 512, ("stage3", "stage4"))])
def test_a_cut_network_has_the_first_stages(stride, channels, beyond):
    module, whole = ResNet50(stride=stride), ResNet50()
    images = jax.ShapeDtypeStruct((2, 224, 193, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, 224 // stride, -(-193 // stride), channels)
    assert module.num_features == channels
    assert variables == {
        kind: {name: leaves for name, leaves in tree.items() if not name.startswith(beyond)}
        for kind, tree in jax.eval_shape(whole.init, jax.random.key(0), images).items()
    }
    assert len(variables["params"]) == 2 + 3 + 4 + (6 if stride == 16 else 0)


@pytest.mark.parametrize("stride", [16, 8])
def test_a_dilated_network_has_all_variables(stride):
    module, whole = ResNet50(stride=stride, stride_by="dilate"), ResNet50()
    images = jax.ShapeDtypeStruct((2, 224, 193, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), images)
    assert features.shape == (2, 224 // stride, -(-193 // stride), 2048)
    assert module.num_features == 2048
    assert variables == jax.eval_shape(whole.init, jax.random.key(0), images)


@pytest.mark.parametrize(("stride", "size"), [(16, (65, 64)), pytest.param(8, (65, 64), marks=pytest.mark.slow)])
def test_each_kth_dilated_cell_is_the_whole_networks(stride, size):
    check_dilated(ResNet(SHALLOW), stride, *size)


@pytest.mark.parametrize(("field", "value"), [("stride", 4), ("stride_by", "pool")])
def test_other_strides_are_refused(field, value):
    with pytest.raises(UserError, match=f"config.model.{field}={value!r} is not one of"):
        jax.eval_shape(ResNet(SMALL, **{field: value}).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


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


@pytest.mark.parametrize(("stride", "by"), [(32, "cut"), *FINER])
def test_geometry_by_chain(stride, by):
    module = ResNet50(stride=stride, stride_by=by)
    assert chain_geometry(module, 224) == (module.stride, module.offset) == (stride, 0)


@pytest.mark.slow  # by the chain of layers above; test_densenet.py has both
@pytest.mark.parametrize(
    ("stride", "by", "size", "cells"),
    [
        (32, "cut", 544, slice(6, 11)),
        (16, "cut", 272, slice(6, 11)),
        (8, "cut", 136, slice(6, 11)),
        (16, "dilate", 544, slice(12, 22)),
        (8, "dilate", 544, slice(24, 44)),
    ],
)
def test_geometry_by_gradient(stride, by, size, cells):
    module = ResNet(SHALLOW, stride=stride, stride_by=by)
    np.testing.assert_allclose(gradient_centre(module, size, cells), module.offset, atol=0.75)


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


@pytest.mark.slow
def test_options_are_the_same_function_when_dilated():
    check_options(ResNet(SHALLOW, stride=8, stride_by="dilate"), 64)


def test_parameters_stay_float32():
    shapes = jax.eval_shape(
        lambda: ResNet(SMALL, dtype=jnp.bfloat16).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
