"""The fused layers against Flax', and the backbones built of them: ResNet and Inception-ResNet-v2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_function import assert_same_function, perturbed_variables, relative_errors, run

from cxa_jax.errors import UserError
from cxa_jax.models.fused_layers import convolve
from cxa_jax.models.inception_resnet_v2 import BLOCK8, MIXED_5B, MIXED_7A, Branches, InceptionResNetV2, dilate
from cxa_jax.models.resnet import ResNet

KERNELS = [
    ((3, 3), (1, 1), "SAME"),
    ((3, 3), (1, 1), "VALID"),
    ((3, 3), (2, 2), "VALID"),
    ((5, 5), (1, 1), "SAME"),
    ((1, 7), (1, 1), "SAME"),
    ((7, 1), (1, 1), "SAME"),
    ((3, 3), (2, 2), ((1, 1), (1, 0))),
    ((1, 1), (1, 1), "SAME"),
    ((1, 1), (2, 2), "SAME"),
    ((1, 1), (2, 2), "VALID"),
]


@pytest.mark.parametrize(("size", "strides", "padding"), KERNELS)
@pytest.mark.parametrize("channels", [3, 17])
def test_convolve_is_the_convolution(size, strides, padding, channels):
    numbers = ("NHWC", "HWIO", "NHWC")
    fast = partial(convolve, strides=strides, padding=padding, dimension_numbers=numbers)
    exact = partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=numbers)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 7, 8, channels), (*size, channels, 5)))
        assert_same_function(fast, exact, x, kernel)


@pytest.mark.parametrize(
    ("size", "padding"), [((3, 3), "SAME"), ((3, 3), "VALID"), ((1, 7), "SAME"), ((7, 1), "SAME"), ((1, 1), "SAME")]
)
@pytest.mark.parametrize("channels", [3, 17])
def test_dilated_convolve_is_the_convolution(size, padding, channels):
    options = {"padding": padding, "rhs_dilation": (2, 2), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    fast = partial(convolve, strides=(1, 1), **options)
    exact = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), **options)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 7, 8, channels), (*size, channels, 5)))
        assert_same_function(fast, exact, x, kernel)


def make_resnet(implementation, dtype):
    return ResNet((1, 1), dtype=dtype, implementation=implementation)


def make_inception(implementation, dtype):
    return InceptionResNetV2((1, 1, 1), dtype=dtype, implementation=implementation)


def make_dilated_resnet(implementation, dtype):
    return ResNet((1, 1, 1), dtype=dtype, implementation=implementation, stride=8, stride_by="dilate")


def make_dilated_inception(implementation, dtype):
    return make_inception(implementation, dtype).clone(stride=8, stride_by="dilate")


CONVS_BEFORE_NORMS = ("stem_conv", "shortcut_conv", "conv1", "conv2", "conv3")  # with a bias, in ResNet


def is_normed(path):
    """Whether a batch norm takes this parameter out again, as ResNet's biases: its gradient is rounding error alone.

    Inception-ResNet-v2 has one: its last residual block is the only one without a ReLU.
    """
    *_, block, layer, leaf = ["", *(key.key for key in path)]
    biased = layer in ("stem_conv", "shortcut_conv", "conv1", "conv2", "conv3") or (block, layer) == (
        "block8_1",
        "conv",
    )
    return leaf == "bias" and biased


def train_and_infer(net, variables, images):
    """Return what `run` does, without the gradients that should be 0, and the largest of these over the largest."""
    result = run(net, variables, images)
    of_params, of_images = result["gradients"]
    leaves = jax.tree_util.tree_leaves_with_path(of_params)
    zeros = [float(jnp.abs(g).max()) for path, g in leaves if is_normed(path)]
    result["gradients"] = [g for path, g in leaves if not is_normed(path)] + [of_images]
    return result, max(zeros, default=0) / float(max(jnp.abs(g).max() for g in result["gradients"]))


def compare(make, dtype, shape):
    """Return the largest relative difference of plain and fused, and the largest gradient that should be zero."""
    images = jnp.asarray(np.random.default_rng(1).random(shape), dtype)
    variables = perturbed_variables(make("plain", dtype), images, dtype)
    (fused, zero), (plain, other) = (train_and_infer(make(i, dtype), variables, images) for i in ("fused", "plain"))
    return max(jax.tree.leaves(relative_errors(fused, plain))), max(zero, other)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (make_resnet, (2, 45, 52, 3)),
        pytest.param(make_inception, (4, 139, 144, 3), marks=pytest.mark.slow),
        pytest.param(make_dilated_resnet, (2, 45, 52, 3), marks=pytest.mark.slow),
        pytest.param(make_dilated_inception, (4, 107, 112, 3), marks=pytest.mark.slow),
    ],
)
def test_equals_plain_in_float64(make, shape):
    """Sides of which every pool and stride drops or pads a line."""
    with jax.enable_x64(True):
        error, should_be_zero = compare(make, jnp.float64, shape)
    assert error < 1e-9 and should_be_zero < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape"), [(make_resnet, (4, 64, 64, 3)), (make_inception, (3, 139, 139, 3))])
def test_float32_is_as_exact_as_plain(make, shape):
    """Batch norms over a few pixels magnify rounding, in either graph: both are compared with float64.

    A ReLU whose input is nearly zero falls on either side by chance, and a few gradients are off by a tenth then, in
    one graph or in the other: so three draws.
    """
    errors = {"fused": [], "plain": []}
    for seed in (1, 2, 3):
        images = np.random.default_rng(seed).random(shape, np.float32)
        variables = perturbed_variables(make("plain", jnp.float32), images, jnp.float32)
        with jax.enable_x64(True):
            exact, _ = train_and_infer(make("plain", jnp.float64), *jax.tree.map(np.float64, (variables, images)))
        exact = jax.tree.map(np.float32, exact)
        for implementation, own in errors.items():
            result, should_be_zero = train_and_infer(make(implementation, jnp.float32), variables, images)
            assert should_be_zero < 1e-4
            own += jax.tree.leaves(relative_errors(result, exact))
    for reduce in (np.median, np.max):
        assert reduce(errors["fused"]) <= max(1e-4, 2 * reduce(errors["plain"])), reduce


@pytest.mark.parametrize(
    ("branches", "dtype"),
    [
        ((*BLOCK8, MIXED_5B[1], MIXED_5B[3]), jnp.float64),
        pytest.param((*BLOCK8, MIXED_5B[1], MIXED_5B[3]), jnp.float32, marks=pytest.mark.slow),
        (dilate(MIXED_7A[2:], 2, strided=False), jnp.float64),
    ],
)
def test_inception_block_equals_plain(branches, dtype):
    """Branches with every kind of kernel at stride 1, an average pool, and strided ones that are dilated instead."""
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 7, 6, 32)), dtype)
        nets = [Branches(branches, dtype=dtype, implementation=implementation) for implementation in ("fused", "plain")]
        variables = perturbed_variables(nets[1], x, dtype)
        errors = relative_errors(*(run(net, variables, x) for net in nets))
    assert max(jax.tree.leaves(errors)) < (1e-9 if dtype == jnp.float64 else 1e-4)


@pytest.mark.parametrize("make", [make_resnet, make_inception])
def test_same_tree_of_variables(make):
    images = jnp.zeros((1, 75, 75, 3))
    got, expected = (jax.eval_shape(make(i, jnp.float32).init, jax.random.key(0), images) for i in ("fused", "plain"))
    assert got == expected


@pytest.mark.parametrize("make", [make_resnet, make_inception])
def test_unknown_implementation_is_named(make):
    with pytest.raises(UserError, match="model.implementation is 'quick'"):
        jax.eval_shape(make("quick", jnp.float32).init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
