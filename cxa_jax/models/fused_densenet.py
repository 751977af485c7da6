"""DenseNet on the fused operations: the same variables as the plain modules of densenet.py, the same function."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models import fused_ops as ops
from cxa_jax.models.fused_dense_block import (
    LayerMoments,
    LayerParams,
    dense_block,
    dense_block_inference,
)
from cxa_jax.models.fused_layers import Norm
from cxa_jax.models.fused_pools import avg_pool_2x2, max_pool_3x3
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

    def setup(self):
        self.norm1 = Norm(self.num_inputs)
        self.conv1 = Kernel((1, 1, self.num_inputs, self.bottleneck))
        self.norm2 = Norm(self.bottleneck)
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
    """The dense block with the variables of DenseBlock: features, and in training the moments of all their channels."""

    num_layers: int
    growth: int
    bottleneck: int
    epsilon: float
    recompute: bool
    kernels: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, ops.Moments | None]:
        num_inputs = x.shape[-1]
        layers = [
            LayerVariables(num_inputs + self.growth * i, self.bottleneck, self.growth, name=f"layer{i + 1}")
            for i in range(self.num_layers)
        ]
        params = tuple(layer.params() for layer in layers)
        if not train:
            return dense_block_inference(x, params, [layer.running() for layer in layers], self.epsilon), None
        features, moments, bottleneck_moments = dense_block(x, params, self.epsilon, self.recompute, self.kernels)
        for layer, norm2 in zip(layers, bottleneck_moments, strict=True):
            layer.update(LayerMoments(ops.first_channels(moments, layer.num_inputs), norm2))
        return features, moments


class Transition(nn.Module):
    """The transition with the variables of its namesake; the pool goes first: a mean and a 1x1 product commute."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, moments: ops.Moments | None) -> jax.Array:
        channels = x.shape[-1]
        norm, conv = Norm(channels, name="norm"), Kernel((1, 1, channels, channels // 2), name="conv")
        return ops.conv_1x1(avg_pool_2x2(norm(x, moments, self.epsilon, relu=True)), conv.kernel)


def fused_densenet(
    images: jax.Array,
    num_layers: tuple[int, ...],
    *,
    growth: int,
    bottleneck: int,
    epsilon: float,
    train: bool,
    dtype: Any,
    recompute: bool,
    kernels: bool,
) -> jax.Array:
    """Build the fused graph in the scope of the calling DenseNet: images [B, H, W, 3] -> F [B, H/32, W/32, C]."""
    padding, convolve = ((3, 3), (3, 3)), convolve_blocks if kernels else None
    x = conv(64, 7, strides=2, padding=padding, dtype=dtype, convolve=convolve, name="stem_conv")(images)
    moments = ops.compute_moments(x) if train else None
    x = Norm(64, name="stem_norm")(x, moments, epsilon, relu=True, kernels=kernels)
    x = max_pool_3x3(x, kernels=kernels)
    for i, n in enumerate(num_layers, start=1):
        if i > 1:
            x = Transition(epsilon, name=f"transition{i - 1}")(x, moments)
        x, moments = Block(n, growth, bottleneck, epsilon, recompute, kernels, name=f"block{i}")(x, train=train)
    return Norm(x.shape[-1], name="norm")(x, moments, epsilon, relu=True)
