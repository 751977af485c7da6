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
from cxa_jax.models.layers import BATCH_NORM_MOMENTUM, GLOROT, conv


class Norm(nn.Module):
    """The variables of nn.BatchNorm: scale and bias, running mean and var; the moving average without the norm."""

    num_features: int

    def setup(self):
        shape = (self.num_features,)
        self.scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def affine(self) -> ops.Affine:
        """Return the learned scale and bias."""
        return ops.Affine(self.scale, self.bias)

    def running(self) -> ops.Moments:
        """Return the running moments."""
        return ops.Moments(self.mean.value, self.var.value)

    def update(self, moments: ops.Moments) -> None:
        """Move the running moments towards the batch's, as nn.BatchNorm does: not while initialising."""
        if self.is_initializing():
            return
        for running, batch in zip((self.mean, self.var), jax.lax.stop_gradient(moments), strict=True):
            running.value = BATCH_NORM_MOMENTUM * running.value + (1 - BATCH_NORM_MOMENTUM) * batch


class Kernel(nn.Module):
    """The variable of nn.Conv without bias: kernel [kh, kw, C_in, C_out], Glorot uniform."""

    shape: tuple[int, ...]

    def setup(self):
        self.kernel = self.param("kernel", GLOROT, self.shape, jnp.float32)


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
        features, moments, bottleneck_moments = dense_block(x, params, self.epsilon, self.recompute)
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
        return ops.conv_1x1(ops.avg_pool_2x2(_norm_relu(norm, x, moments, self.epsilon)), conv.kernel)


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
) -> jax.Array:
    """Build the fused graph in the scope of the calling DenseNet: images [B, H, W, 3] -> F [B, H/32, W/32, C]."""
    x = conv(64, 7, strides=2, padding=((3, 3), (3, 3)), dtype=dtype, name="stem_conv")(images)
    moments = ops.compute_moments(x) if train else None
    x = ops.max_pool_3x3(_norm_relu(Norm(64, name="stem_norm"), x, moments, epsilon))
    for i, n in enumerate(num_layers, start=1):
        if i > 1:
            x = Transition(epsilon, name=f"transition{i - 1}")(x, moments)
        x, moments = Block(n, growth, bottleneck, epsilon, recompute, name=f"block{i}")(x, train=train)
    return _norm_relu(Norm(x.shape[-1], name="norm"), x, moments, epsilon)


def _norm_relu(norm: Norm, x: jax.Array, moments: ops.Moments | None, epsilon: float) -> jax.Array:
    """Normalise by the batch's moments and note them, or by the running ones where there are none; then ReLU."""
    if moments is None:
        return ops.affine_relu(x, ops.fold_batch_norm(norm.running(), norm.affine(), epsilon))
    norm.update(moments)
    return ops.normalize_relu(x, moments, norm.affine(), epsilon)
