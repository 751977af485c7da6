"""ResNet-50 v1 without top (He et al. 2016), the graph of Keras applications (R16, R17, A18, A19)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import add_relu, check_images, check_implementation, conv, max_pool_3x3, norm, remat

EXPANSION = 4  # a block's output channels over its inner ones
EPSILON = 1.001e-5


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut: [B, H, W, C] -> [B, H/strides, W/strides, 4 * num_features].

    The stride stands in the first 1x1 convolution, and every convolution has a bias: v1 as Keras has it. The biases
    feed batch norms, which take them out again, so in training their gradient is zero.
    """

    num_features: int
    strides: int = 1
    project: bool = False  # a 1x1 convolution on the shortcut; else the identity
    dtype: Any = jnp.float32
    implementation: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = _layers(train, self.dtype, self.implementation)
        width = EXPANSION * self.num_features
        shortcut = x
        if self.project:
            shortcut = conv(width, 1, strides=self.strides, name="shortcut_conv")(x)
            shortcut = norm(shortcut, relu=False, name="shortcut_norm")
        x = norm(conv(self.num_features, 1, strides=self.strides, name="conv1")(x), name="norm1")
        x = norm(conv(self.num_features, 3, name="conv2")(x), name="norm2")
        x = norm(conv(width, 1, name="conv3")(x), relu=False, name="norm3")
        return add_relu(x, shortcut, implementation=self.implementation)


def _layers(train: bool, dtype: Any, implementation: str) -> tuple[Callable, Callable]:
    """Return this network's convolution, which has a bias, and its batch norm, which ReLU follows."""
    options = {"dtype": dtype, "implementation": implementation}
    return partial(conv, use_bias=True, **options), partial(norm, relu=True, train=train, epsilon=EPSILON, **options)


def _apply_block(block: Bottleneck, x: jax.Array, *, train: bool) -> jax.Array:
    return block(x, train=train)


class ResNet(nn.Module):
    """ResNet v1 features: images [B, H, W, 3] -> F [B, H/32, W/32, num_features] (rounded up), H, W >= 32.

    Attributes:
      num_blocks: bottleneck blocks in each of the four stages.
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' is Flax' layers; 'fused' the same function of the same variables, faster (layers.py).
      remat: recompute each block in the backward pass.
    """

    num_blocks: tuple[int, ...]
    dtype: Any = jnp.float32
    implementation: str = "plain"
    remat: bool = False

    stride = 32  # px between receptive-field centres of neighbouring cells
    offset = 0  # px, receptive-field centre of cell 0
    min_size = 32  # px, least side of an image, as Keras has it

    @property
    def num_features(self) -> int:
        """Channels C of the feature map."""
        return EXPANSION * 64 * 2 ** (len(self.num_blocks) - 1)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_images(images, self.min_size, type(self).__name__)
        check_implementation(self.implementation)
        conv, norm = _layers(train, self.dtype, self.implementation)
        x = conv(64, 7, strides=2, padding=((3, 3), (3, 3)), name="stem_conv")(images)
        x = max_pool_3x3(norm(x, name="stem_norm"), implementation=self.implementation)
        apply_block = partial(_apply_block, train=train)
        if self.remat:
            apply_block = remat(apply_block)
        for i, num_blocks in enumerate(self.num_blocks, start=1):
            for j in range(1, num_blocks + 1):
                block = Bottleneck(
                    64 * 2 ** (i - 1),
                    strides=2 if i > 1 and j == 1 else 1,
                    project=j == 1,
                    dtype=self.dtype,
                    implementation=self.implementation,
                    name=f"stage{i}_block{j}",
                )
                x = apply_block(block, x)
        return x


ResNet50 = partial(ResNet, num_blocks=(3, 4, 6, 3))
