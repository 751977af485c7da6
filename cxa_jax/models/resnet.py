"""ResNet-50 v1 without top (He et al. 2016), the graph of Keras applications (R16, R17, A18, A19)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import batch_norm, check_images, conv, max_pool_3x3

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

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        biased_conv = partial(conv, use_bias=True, dtype=self.dtype)
        norm = partial(batch_norm, train=train, epsilon=EPSILON, dtype=self.dtype)
        width = EXPANSION * self.num_features
        shortcut = x
        if self.project:
            shortcut = norm(name="shortcut_norm")(biased_conv(width, 1, strides=self.strides, name="shortcut_conv")(x))
        x = biased_conv(self.num_features, 1, strides=self.strides, name="conv1")(x)
        x = biased_conv(self.num_features, 3, name="conv2")(nn.relu(norm(name="norm1")(x)))
        x = biased_conv(width, 1, name="conv3")(nn.relu(norm(name="norm2")(x)))
        return nn.relu(shortcut + norm(name="norm3")(x))


def _apply_block(block: Bottleneck, x: jax.Array, *, train: bool) -> jax.Array:
    return block(x, train=train)


class ResNet(nn.Module):
    """ResNet v1 features: images [B, H, W, 3] -> F [B, H/32, W/32, num_features] (rounded up), H, W >= 32.

    Attributes:
      num_blocks: bottleneck blocks in each of the four stages.
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' or 'fused', the same graph here: there is no rewrite of this network.
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
        x = conv(64, 7, strides=2, padding=((3, 3), (3, 3)), use_bias=True, dtype=self.dtype, name="stem_conv")(images)
        x = batch_norm(train=train, epsilon=EPSILON, dtype=self.dtype, name="stem_norm")(x)
        x = max_pool_3x3(nn.relu(x))
        apply_block = partial(_apply_block, train=train)
        if self.remat:
            apply_block = nn.remat(apply_block)
        for i, num_blocks in enumerate(self.num_blocks, start=1):
            for j in range(1, num_blocks + 1):
                block = Bottleneck(
                    64 * 2 ** (i - 1),
                    strides=2 if i > 1 and j == 1 else 1,
                    project=j == 1,
                    dtype=self.dtype,
                    name=f"stage{i}_block{j}",
                )
                x = apply_block(block, x)
        return x


ResNet50 = partial(ResNet, num_blocks=(3, 4, 6, 3))
