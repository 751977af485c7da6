"""ResNet-50 v1 without top (He et al. 2016), the graph of Keras applications (R16, R17, A18, A19)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import (
    BATCH_NORM_MOMENTUM,
    add_relu,
    check_images,
    check_implementation,
    conv,
    max_pool_3x3,
    norm,
    remat,
)
from cxa_jax.models.strides import check_stride, find_last_stride

EXPANSION = 4  # a block's output channels over its inner ones
EPSILON = 1.001e-5


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut: [B, H, W, C] -> [B, H/strides, W/strides, 4 * num_features].

    The stride stands in the first 1x1 convolution, and every convolution has a bias: v1 as Keras has it. The biases
    feed batch norms, which take them out again, so in training their gradient is zero.
    """

    num_features: int
    strides: int = 1
    dilation: int = 1  # of the 3x3 convolution
    project: bool = False  # a 1x1 convolution on the shortcut; else the identity
    dtype: Any = jnp.float32
    implementation: str = "plain"
    momentum: float = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = _layers(train, self.dtype, self.implementation, self.momentum)
        width = EXPANSION * self.num_features
        shortcut = x
        if self.project:
            shortcut = conv(width, 1, strides=self.strides, name="shortcut_conv")(x)
            shortcut = norm(shortcut, relu=False, name="shortcut_norm")
        x = norm(conv(self.num_features, 1, strides=self.strides, name="conv1")(x), name="norm1")
        x = norm(conv(self.num_features, 3, dilation=self.dilation, name="conv2")(x), name="norm2")
        x = norm(conv(width, 1, name="conv3")(x), relu=False, name="norm3")
        return add_relu(x, shortcut, implementation=self.implementation)


def _layers(train: bool, dtype: Any, implementation: str, momentum: float) -> tuple[Callable, Callable]:
    """Return this network's convolution, which has a bias, and its batch norm, which ReLU follows."""
    options = {"dtype": dtype, "implementation": implementation}
    norms = {"relu": True, "train": train, "epsilon": EPSILON, "momentum": momentum}
    return partial(conv, use_bias=True, **options), partial(norm, **norms, **options)


def _apply_block(block: Bottleneck, x: jax.Array, *, train: bool) -> jax.Array:
    return block(x, train=train)


class ResNet(nn.Module):
    """ResNet v1 features: images [B, H, W, 3] -> F [B, H/stride, W/stride, num_features] (rounded up), H, W >= 32.

    Attributes:
      num_blocks: bottleneck blocks in each of the four stages of the whole network.
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' is Flax' layers; 'fused' the same function of the same variables, faster (layers.py).
      remat: recompute each block in the backward pass.
      stride: px between receptive-field centres of neighbouring cells, one of STRIDES; each stage doubles it from 4 on.
      stride_by: 'cut' ends after the stage of that stride, whose last ReLU closes the network. 'dilate' keeps all
        stages: those that would have a larger stride have this one, their 3x3 convolutions dilated by 2, then 4. In
        evaluation features[:, ::k, ::k], k = 32 / stride, are the whole network's, of images of any size.
      batch_norm_momentum: share of the running moments that a training step leaves as it was.
    """

    num_blocks: tuple[int, ...]
    dtype: Any = jnp.float32
    implementation: str = "plain"
    remat: bool = False
    stride: int = 32
    stride_by: str = "cut"
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM

    offset = 0  # px, receptive-field centre of cell 0: every window is padded by half of it
    min_size = 32  # px, least side of an image, as Keras has it

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """The blocks of the stages that this network has."""
        return self.num_blocks[: find_last_stride(self.stride, self.stride_by).bit_length() - 2]

    @property
    def num_features(self) -> int:
        """Channels C of the feature map."""
        return EXPANSION * 64 * 2 ** (len(self.kept_blocks) - 1)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_images(images, self.min_size, type(self).__name__)
        check_implementation(self.implementation)
        check_stride(self.stride, self.stride_by)
        conv, norm = _layers(train, self.dtype, self.implementation, self.batch_norm_momentum)
        x = conv(64, 7, strides=2, padding=((3, 3), (3, 3)), name="stem_conv")(images)
        x = max_pool_3x3(norm(x, name="stem_norm"), implementation=self.implementation)
        apply_block = partial(_apply_block, train=train)
        if self.remat:
            apply_block = remat(apply_block)
        for i, num_blocks in enumerate(self.kept_blocks, start=1):
            dilation = max(1, 2 ** (i + 1) // self.stride)  # over the stage's stride in the whole network
            for j in range(1, num_blocks + 1):
                block = Bottleneck(
                    64 * 2 ** (i - 1),
                    strides=2 if i > 1 and j == 1 and dilation == 1 else 1,
                    dilation=dilation,
                    project=j == 1,
                    dtype=self.dtype,
                    implementation=self.implementation,
                    momentum=self.batch_norm_momentum,
                    name=f"stage{i}_block{j}",
                )
                x = apply_block(block, x)
        return x


ResNet50 = partial(ResNet, num_blocks=(3, 4, 6, 3))
