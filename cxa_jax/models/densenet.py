"""DenseNet-121 and -201 without top (Huang et al. 2017), the graph of Keras applications (R16, R17, A19)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.fused_densenet import fused_densenet
from cxa_jax.models.layers import (
    BATCH_NORM_MOMENTUM,
    batch_norm,
    check_images,
    check_implementation,
    conv,
    max_pool_3x3,
    remat,
)
from cxa_jax.models.strides import avg_pool_everywhere, check_stride, find_last_stride

GROWTH = 32  # channels each layer adds
BOTTLENECK = 4 * GROWTH  # channels after a layer's 1x1 convolution
EPSILON = 1.001e-5


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution: [B, H, W, C] -> the 32 new channels [B, H, W, 32]."""

    dtype: Any = jnp.float32
    momentum: float = BATCH_NORM_MOMENTUM
    dilation: int = 1  # of the 3x3 convolution

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(batch_norm, train=train, epsilon=EPSILON, momentum=self.momentum, dtype=self.dtype)
        x = conv(BOTTLENECK, 1, dtype=self.dtype, name="conv1")(nn.relu(norm(name="norm1")(x)))
        x = nn.relu(norm(name="norm2")(x))
        return conv(GROWTH, 3, dilation=self.dilation, dtype=self.dtype, name="conv2")(x)


class DenseBlock(nn.Module):
    """Dense layers, each reading all channels before it: [B, H, W, C] -> [B, H, W, C + 32 * num_layers]."""

    num_layers: int
    dtype: Any = jnp.float32
    remat: bool = False
    momentum: float = BATCH_NORM_MOMENTUM
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        layer = partial(_apply_layer, train=train)
        if self.remat:
            layer = remat(layer)
        for i in range(self.num_layers):
            x = layer(DenseLayer(self.dtype, self.momentum, self.dilation, name=f"layer{i + 1}"), x)
        return x


def _apply_layer(layer: DenseLayer, x: jax.Array, *, train: bool) -> jax.Array:
    return jnp.concatenate([x, layer(x, train=train)], axis=-1)


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution to half the channels, 2x2 average pool: [B, H, W, C] -> [B, H/2, W/2, C/2].

    With `spacing` the pool stands on every cell, its taps so many cells apart: -> [B, H, W, C/2].
    """

    dtype: Any = jnp.float32
    momentum: float = BATCH_NORM_MOMENTUM
    spacing: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(batch_norm, train=train, epsilon=EPSILON, momentum=self.momentum, dtype=self.dtype)
        x = nn.relu(norm(name="norm")(x))
        x = conv(x.shape[-1] // 2, 1, dtype=self.dtype, name="conv")(x)
        return avg_pool_everywhere(x, self.spacing) if self.spacing else nn.avg_pool(x, (2, 2), (2, 2))


class DenseNet(nn.Module):
    """DenseNet features: images [B, H, W, 3] -> F [B, H/stride, W/stride, num_features], H, W >= 32.

    Attributes:
      num_layers: dense layers in each of the four blocks of the whole network.
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' is the graph as written here; 'fused' the same function of the same variables, faster
        (fused_densenet.py), 'kernels' the fused graph with a GPU's own kernels in training (dense_kernels.py).
      remat: recompute each layer in the backward pass ('fused' always does, but for the 1x1 convolutions).
      stride: px between receptive-field centres of neighbouring cells, one of STRIDES; each block doubles it from 4 on.
      stride_by: 'cut' ends after the block of that stride, with a norm and ReLU of its channels. 'dilate' keeps all
        blocks; the average pools behind that stride no longer halve the grid (`avg_pool_everywhere`), and 3x3
        convolutions are dilated by 2, then 4. F is then [B, k h, k w, C], k = 32 / stride, where the whole network has
        [B, h, w, C], for every size of image: what its pools drop of odd sides is dropped here too.
      batch_norm_momentum: share of the running moments that a training step leaves as it was.
    """

    num_layers: tuple[int, ...]
    dtype: Any = jnp.float32
    implementation: str = "plain"
    remat: bool = False
    stride: int = 32
    stride_by: str = "cut"
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM

    min_size = 32  # px, least side of an image, as Keras has it

    @property
    def offset(self) -> int:
        """Px, receptive-field centre of cell 0; averaging cells s px apart moves it by s / 2, from s = 4 on.

        Of a dilated network it is the whole one's, so that its last cells are centred beyond the image.
        """
        return find_last_stride(self.stride, self.stride_by) // 2 - 2

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The dense layers of the blocks that this network has."""
        return self.num_layers[: find_last_stride(self.stride, self.stride_by).bit_length() - 2]

    def find_norm(self, block: int) -> tuple[str, ...]:
        """Return the path of the norm behind a block, counted from 1: the closing one, or that of its transition.

        A cut network's closing norm is where the whole one's transition has its own, of the same channels.
        """
        return ("norm",) if block == len(self.kept_layers) else (f"transition{block}", "norm")

    def find_dilation(self, block: int) -> int:
        """Return by how much the 3x3 convolutions of a block, counted from 1, are dilated."""
        return max(1, 2 ** (block + 1) // self.stride)

    @property
    def num_features(self) -> int:
        """Channels C of the feature map."""
        channels = 64
        for i, n in enumerate(self.kept_layers):
            channels = (channels if i == 0 else channels // 2) + GROWTH * n
        return channels

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_images(images, self.min_size, type(self).__name__)
        check_implementation(self.implementation, ("plain", "fused", "kernels"))
        check_stride(self.stride, self.stride_by)
        if self.implementation != "plain":
            return fused_densenet(
                images,
                self.kept_layers,
                stride=self.stride,
                growth=GROWTH,
                bottleneck=BOTTLENECK,
                epsilon=EPSILON,
                momentum=self.batch_norm_momentum,
                train=train,
                dtype=self.dtype,
                recompute=self.remat,
                kernels=self.implementation == "kernels",
            )
        options = {"dtype": self.dtype, "momentum": self.batch_norm_momentum}
        norm = partial(batch_norm, train=train, epsilon=EPSILON, **options)
        x = conv(64, 7, strides=2, padding=((3, 3), (3, 3)), dtype=self.dtype, name="stem_conv")(images)
        x = max_pool_3x3(nn.relu(norm(name="stem_norm")(x)))
        for i, n in enumerate(self.kept_layers, start=1):
            dilation = self.find_dilation(i)
            if i > 1:
                spacing = self.find_dilation(i - 1) if dilation > 1 else 0
                x = Transition(**options, spacing=spacing, name=f"transition{i - 1}")(x, train=train)
            x = DenseBlock(n, remat=self.remat, **options, dilation=dilation, name=f"block{i}")(x, train=train)
        return nn.relu(norm(name="norm")(x))


DenseNet121 = partial(DenseNet, num_layers=(6, 12, 24, 16))
DenseNet201 = partial(DenseNet, num_layers=(6, 12, 48, 32))
