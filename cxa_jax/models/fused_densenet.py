"""DenseNet on the fused operations: the same variables as the plain modules of densenet.py, the same function."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models import fused_norms
from cxa_jax.models.fused_convolutions import conv_1x1
from cxa_jax.models.fused_dense_block import (
    LayerMoments,
    LayerParams,
    dense_block,
    dense_block_inference,
)
from cxa_jax.models.fused_layers import Norm, convolve
from cxa_jax.models.fused_pools import avg_pool_2x2, avg_pool_to_phases, max_pool_3x3, merge_phases
from cxa_jax.models.fused_stem import convolve_blocks
from cxa_jax.models.initialization import glorot_uniform
from cxa_jax.models.layers import conv


class Kernel(nn.Module):
    """The variable of nn.Conv without bias: kernel [kh, kw, C_in, C_out], Glorot uniform."""

    shape: tuple[int, ...]

    def setup(self):
        self.kernel = self.param("kernel", glorot_uniform, self.shape, jnp.float32)


class LayerVariables(nn.Module):
    """The variables of one DenseLayer."""

    num_inputs: int
    bottleneck: int
    growth: int
    momentum: float

    def setup(self):
        self.norm1 = Norm(self.num_inputs, momentum=self.momentum)
        self.conv1 = Kernel((1, 1, self.num_inputs, self.bottleneck))
        self.norm2 = Norm(self.bottleneck, momentum=self.momentum)
        self.conv2 = Kernel((3, 3, self.bottleneck, self.growth))

    def params(self) -> LayerParams:
        """Return the layer's parameters."""
        return LayerParams(self.norm1.affine(), self.conv1.kernel, self.norm2.affine(), self.conv2.kernel)

    def running(self) -> LayerMoments:
        """Return the running moments of both norms."""
        return LayerMoments(self.norm1.running(), self.norm2.running())

    def update(self, moments: LayerMoments) -> None:
        """Move the running moments of both norms."""
        self.norm1.update(moments.norm1)
        self.norm2.update(moments.norm2)


class Block(nn.Module):
    """The dense block with the variables of DenseBlock, and the norm behind it, whose variables are elsewhere."""

    num_layers: int
    growth: int
    bottleneck: int
    epsilon: float
    momentum: float
    recompute: bool
    kernels: bool

    @nn.compact
    def __call__(self, x: jax.Array, closing: Norm, *, train: bool) -> jax.Array:
        num_inputs = x.shape[-1]
        sizes = self.bottleneck, self.growth, self.momentum
        layers = [
            LayerVariables(num_inputs + self.growth * i, *sizes, name=f"layer{i + 1}") for i in range(self.num_layers)
        ]
        params = tuple(layer.params() for layer in layers)
        if not train:
            x = dense_block_inference(x, params, [layer.running() for layer in layers], self.epsilon)
            return closing(x, None, self.epsilon, relu=True)
        x, moments, bottleneck_moments = dense_block(
            x, params, closing.affine(), self.epsilon, self.recompute, self.kernels
        )
        closing.update(moments)
        for layer, norm2 in zip(layers, bottleneck_moments, strict=True):
            layer.update(LayerMoments(fused_norms.first_channels(moments, layer.num_inputs), norm2))
        return x


class Transition(nn.Module):
    """The transition with the variables of its namesake; the pool goes first: a mean and a 1x1 product commute.

    Its norm is applied by the block before it, to which it is handed.
    """

    num_inputs: int
    momentum: float

    def setup(self):
        self.norm = Norm(self.num_inputs, momentum=self.momentum)
        self.conv = Kernel((1, 1, self.num_inputs, self.num_inputs // 2))

    def __call__(self, x: jax.Array, *, dilate: bool) -> jax.Array:
        pool = avg_pool_to_phases if dilate else avg_pool_2x2
        return conv_1x1(pool(x), self.conv.kernel)


def fused_densenet(
    images: jax.Array,
    num_layers: tuple[int, ...],
    *,
    stride: int,
    growth: int,
    bottleneck: int,
    epsilon: float,
    momentum: float,
    train: bool,
    dtype: Any,
    recompute: bool,
    kernels: bool,
) -> jax.Array:
    """Build the fused graph in the scope of the calling DenseNet: images [B, H, W, 3] -> F [B, h, w, C].

    A dilated block is the ordinary block on the phases of its grid, laid into the batch: its norms and 1x1 products do
    not ask where a cell stands, and a 3x3 convolution dilated by two is the ordinary one on every second cell. So from
    the first pool that keeps the grid on, blocks see four times as many images, then sixteen, and the features go back
    into one grid at the end.
    """
    stem = {"padding": ((3, 3), (3, 3)), "convolve": convolve_blocks if kernels else convolve}
    x = conv(64, 7, strides=2, dtype=dtype, **stem, name="stem_conv")(images)
    moments = fused_norms.compute_moments(x) if train else None
    x = Norm(64, momentum=momentum, name="stem_norm")(x, moments, epsilon, relu=True, kernels=kernels)
    x = max_pool_3x3(x, kernels=kernels)
    num_dilated = 0
    for i, n in enumerate(num_layers, start=1):
        num_channels = x.shape[-1] + growth * n
        block = Block(n, growth, bottleneck, epsilon, momentum, recompute, kernels, name=f"block{i}")
        if i == len(num_layers):
            break
        transition = Transition(num_channels, momentum, name=f"transition{i}")
        dilate = 2 ** (i + 2) > stride
        num_dilated += dilate
        x = transition(block(x, transition.norm, train=train), dilate=dilate)
    x = block(x, Norm(num_channels, momentum=momentum, name="norm"), train=train)
    for _ in range(num_dilated):
        x = merge_phases(x)
    return x
