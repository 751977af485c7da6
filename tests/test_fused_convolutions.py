"""The fused convolutions against lax: values and gradients in float64, odd sizes."""

import jax
import pytest
from same_function import assert_same_function, random_array

from cxa_jax.models import fused_convolutions as ops

SIZES = [(1, 2), (5, 6), (7, 9)]

pytestmark = pytest.mark.usefixtures("float64")


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("size", SIZES)
def test_conv_1x1_is_the_convolution(size):
    assert_same_function(ops.conv_1x1, convolve, random_array(2, *size, 6), random_array(1, 1, 6, 4, seed=1))


@pytest.mark.parametrize("size", SIZES)
def test_conv_3x3_is_the_convolution(size):
    assert_same_function(ops.conv_3x3, convolve, random_array(2, *size, 6), random_array(3, 3, 6, 4, seed=1))


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding", "dilation"),
    [
        ((7, 9), (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2)),
        ((9, 8), (3, 3), (1, 1), ((0, 0), (0, 0)), (3, 3)),
        ((5, 8), (1, 7), (1, 1), ((0, 0), (6, 6)), (2, 2)),
        ((9, 12), (3, 2), (2, 3), ((0, 3), (1, 0)), (3, 2)),
    ],
)
def test_dilated_conv_windows_is_the_convolution(size, window, strides, padding, dilation):
    def expected(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers
        )

    def windows(x, kernel):
        return ops.conv_windows(x, kernel, strides, padding, dilation)

    assert_same_function(windows, expected, random_array(2, *size, 3), random_array(*window, 3, 5, seed=1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"),
    [
        ((9, 12), (7, 7), (2, 2), ((3, 3), (3, 3))),
        ((8, 7), (3, 3), (2, 2), ((0, 0), (0, 0))),
        ((5, 6), (1, 4), (1, 3), ((0, 1), (2, 0))),
    ],
)
def test_conv_images_is_the_convolution(batch, size, window, strides, padding):
    def expected(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def images(x, kernel):
        return ops.conv_images(x, kernel, strides, padding)

    assert_same_function(images, expected, random_array(batch, *size, 3), random_array(*window, 3, 5, seed=1))
