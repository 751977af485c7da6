"""Arithmetic counted from the traced function, against XLA's own count on a processor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cxa_jax.flops import count_flops
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet


def count(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_products():
    a, b = jnp.ones((5, 64, 32)), jnp.ones((5, 32, 16))
    assert count(jnp.matmul, a, b) == 2 * 5 * 64 * 32 * 16
    assert count(lambda a, b: jnp.einsum("bij,bjk->ik", a, b), a, b) == 2 * 5 * 64 * 32 * 16
    assert count(jnp.sin, a) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients(stride):
    """Each of the three products pairs every output with its window; padding, 'VALID' here, is no pair."""
    x, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    pixels = {1: 49, 2: 16}[stride]
    forward = 2 * 2 * pixels * 8 * 3 * 3 * 4
    assert count(convolve, x, kernel) == forward
    gradient = count(jax.grad(lambda *args: convolve(*args).sum(), (0, 1)), x, kernel)
    # That of the image is over all 81 pixels: as if each had a whole window, over the stride.
    assert gradient == forward * 2 + 2 * 2 * 81 * 8 * 3 * 3 * 4 // stride**2


def test_what_is_inside_loops_and_custom_gradients_counts():
    a = jnp.ones((16, 16))
    one = 2 * 16**3

    def loop(a):
        return lax.scan(lambda carry, _: (carry @ a, None), a, length=7)[0]

    special = jax.custom_vjp(lambda a: a @ a)
    special.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a,))
    assert count(loop, a) == 7 * one
    assert count(jax.jit(jax.checkpoint(lambda a: a @ a)), a) == one
    assert count(jax.grad(lambda a: special(a).sum()), a) == 2 * one


@pytest.mark.parametrize("net", [DenseNet((2, 2, 2, 2)), ResNet((1, 1, 1, 1)), InceptionResNetV2((1, 1, 1))])
def test_backbones_as_xla_counts(net):
    """XLA counts what is elementwise too, and no edges: within a tenth."""
    images = jnp.asarray(np.random.default_rng(0).random((2, 128, 128, 3)), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)

    def loss(params, batch_stats, images):
        features, _ = net.apply(
            {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        return features.sum()

    traced = jax.jit(jax.grad(loss)).trace(variables["params"], variables["batch_stats"], images)
    assert count_flops(traced.jaxpr.jaxpr) == pytest.approx(traced.lower().cost_analysis()["flops"], rel=0.1)
