"""Inception-ResNet-v2 without top (Szegedy et al. 2017), the graph of Keras applications (R16, R17, A18, A19)."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import (
    BATCH_NORM_MOMENTUM,
    check_images,
    check_implementation,
    conv,
    max_pool_3x3,
    norm,
    remat,
)
from cxa_jax.models.strides import check_stride, find_last_stride
from cxa_jax.models.tracing import trace_blocks_once

EPSILON = 1e-3


class Conv(NamedTuple):
    """One convolution of a branch; batch norm (no scale) and ReLU follow it."""

    num_features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    padding: str = "SAME"
    dilation: int = 1


class Pool(NamedTuple):
    """One 3x3 pool of a branch: 'max', valid, or 'avg' at stride 1, same."""

    kind: str
    strides: int
    dilation: int = 1


AVG_POOL, MAX_POOL = Pool("avg", 1), Pool("max", 2)
Branch = tuple[Conv | Pool, ...]

REDUCE = partial(Conv, kernel_size=3, strides=2, padding="VALID")
STEM: Branch = (
    REDUCE(32),
    Conv(32, 3, padding="VALID"),
    Conv(64, 3),
    MAX_POOL,
    Conv(80, 1),
    Conv(192, 3, padding="VALID"),
    MAX_POOL,
)
MIXED_5B = ((Conv(96),), (Conv(48), Conv(64, 5)), (Conv(64), Conv(96, 3), Conv(96, 3)), (AVG_POOL, Conv(64)))
MIXED_6A = ((REDUCE(384),), (Conv(256), Conv(256, 3), REDUCE(384)), (MAX_POOL,))
MIXED_7A = ((Conv(256), REDUCE(384)), (Conv(256), REDUCE(288)), (Conv(256), Conv(288, 3), REDUCE(320)), (MAX_POOL,))
BLOCK35 = ((Conv(32),), (Conv(32), Conv(32, 3)), (Conv(32), Conv(48, 3), Conv(64, 3)))
BLOCK17 = ((Conv(192),), (Conv(128), Conv(160, (1, 7)), Conv(192, (7, 1))))
BLOCK8 = ((Conv(192),), (Conv(192), Conv(224, (1, 3)), Conv(256, (3, 1))))


def dilate(branches: tuple[Branch, ...], dilation: int, *, strided: bool) -> tuple[Branch, ...]:
    """Return the branches with every window dilated, and at stride 1 unless `strided`."""

    def change(step: Conv | Pool) -> Conv | Pool:
        return step._replace(dilation=dilation, strides=step.strides if strided else 1)

    return tuple(tuple(map(change, branch)) for branch in branches)


class ConvNorm(nn.Module):
    """Convolution, batch norm without scale, ReLU: [B, H, W, C] -> [B, h, w, spec.num_features]."""

    spec: Conv
    dtype: Any = jnp.float32
    implementation: str = "plain"
    momentum: float = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        spec, options = self.spec._asdict(), {"dtype": self.dtype, "implementation": self.implementation}
        x = conv(spec.pop("num_features"), **spec, **options, name="conv")(x)
        norms = {"relu": True, "train": train, "epsilon": EPSILON, "momentum": self.momentum, "use_scale": False}
        return norm(x, **norms, **options, name="norm")


class Branches(nn.Module):
    """Parallel chains of ConvNorms and pools, concatenated: [B, H, W, C] -> [B, h, w, sum of the branches' channels].

    Step i of branch b is the submodule `branch{b}_conv{i}`, counted from 1, pools left out.
    """

    branches: tuple[Branch, ...]
    dtype: Any = jnp.float32
    implementation: str = "plain"
    momentum: float = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return jnp.concatenate([self._chain(b, branch, x, train) for b, branch in enumerate(self.branches, 1)], axis=-1)

    def _chain(self, b: int, branch: Branch, x: jax.Array, train: bool) -> jax.Array:
        options = {"dtype": self.dtype, "implementation": self.implementation, "momentum": self.momentum}
        conv_norm = partial(ConvNorm, **options)
        num_convs = 0
        for step in branch:
            if isinstance(step, Conv):
                num_convs += 1
                x = conv_norm(step, name=f"branch{b}_conv{num_convs}")(x, train=train)
            elif step.kind == "max":
                window = {"strides": step.strides, "dilation": step.dilation, "padding": 0}
                x = max_pool_3x3(x, **window, implementation=self.implementation)
            else:  # without the padding in the mean, as Keras has it
                x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        return x


class ResidualBlock(nn.Module):
    """x + scale * conv1x1(branches(x)), then ReLU unless `relu` is False: [B, H, W, C] -> [B, H, W, C]."""

    branches: tuple[Branch, ...]
    scale: float
    relu: bool = True
    dtype: Any = jnp.float32
    implementation: str = "plain"
    momentum: float = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        options = {"dtype": self.dtype, "implementation": self.implementation}
        mixed = Branches(self.branches, **options, momentum=self.momentum, name="branches")(x, train=train)
        x = x + self.scale * conv(x.shape[-1], 1, use_bias=True, **options, name="conv")(mixed)
        return nn.relu(x) if self.relu else x


def _apply_block(block: ResidualBlock, x: jax.Array, *, train: bool) -> jax.Array:
    return block(x, train=train)


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2 features: images [B, H, W, 3] -> F [B, h, w, num_features], h = 5 at H = 224.

    Every strided layer is 'valid', so h is less than H / stride. With H, W >= min_size it is exactly, rounded down,

        stride   cut              dilate
        32       (H - 43) / 32    (H - 43) / 32
        16       (H - 27) / 16    (H - 59) / 16
         8       (H - 19) / 8     (H - 67) / 8

    Attributes:
      num_blocks: residual blocks of the three kinds of the whole network (35, 17 and 8 wide at H = 299).
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' is Flax' layers; 'fused' the same function of the same variables, faster (layers.py).
      remat: recompute each residual block in the backward pass.
      stride: px between receptive-field centres of neighbouring cells, one of STRIDES.
      stride_by: 'cut' ends after the residual blocks of that stride, whose last ReLU closes the network. 'dilate' keeps
        all blocks: strided layers behind that stride have stride 1, and all windows after them a dilation of 2, then 4.
        In evaluation features[:, ::k, ::k], k = 32 / stride, are the whole network's, of images of any size.
      batch_norm_momentum: share of the running moments that a training step leaves as it was.
    """

    num_blocks: tuple[int, int, int] = (10, 20, 10)
    dtype: Any = jnp.float32
    implementation: str = "plain"
    remat: bool = False
    stride: int = 32
    stride_by: str = "cut"
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM

    @property
    def num_features(self) -> int:
        """Channels C of the feature map."""
        return {32: 1536, 16: 1088, 8: 320}[find_last_stride(self.stride, self.stride_by)]

    @property
    def offset(self) -> int:
        """Px, receptive-field centre of cell 0: a valid 3x3 window on cells s px apart moves it by s."""
        return find_last_stride(self.stride, self.stride_by) + 5

    @property
    def min_size(self) -> int:
        """Px, least side of an image: of the whole network as Keras has it, of a cut one that of one cell."""
        return 2 * find_last_stride(self.stride, self.stride_by) + 11

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_stride(self.stride, self.stride_by)
        check_images(images, self.min_size, type(self).__name__)
        check_implementation(self.implementation)
        branches, last_stride = partial(Branches, **self._options), find_last_stride(self.stride, self.stride_by)
        x = branches((STEM,), name="stem")(images, train=train)
        x = branches(MIXED_5B, name="mixed_5b")(x, train=train)
        x = self._residual("block35", BLOCK35, 0.17, self.num_blocks[0], x, train)
        if last_stride == 8:
            return x
        x = branches(self._fit(MIXED_6A, 8), name="mixed_6a")(x, train=train)
        x = self._residual("block17", self._fit(BLOCK17, 16), 0.1, self.num_blocks[1], x, train)
        if last_stride == 16:
            return x
        x = branches(self._fit(MIXED_7A, 16), name="mixed_7a")(x, train=train)
        block8 = self._fit(BLOCK8, 32)
        x = self._residual("block8", block8, 0.2, self.num_blocks[2] - 1, x, train)
        last = ResidualBlock(block8, 1.0, relu=False, **self._options, name=f"block8_{self.num_blocks[2]}")
        x = last(x, train=train)
        return ConvNorm(Conv(self.num_features), **self._options, name="conv_7b")(x, train=train)

    @property
    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "implementation": self.implementation, "momentum": self.batch_norm_momentum}

    def _fit(self, branches: tuple[Branch, ...], whole: int) -> tuple[Branch, ...]:
        """Return the branches as this network's stride asks, from their input's stride in the whole network."""
        return dilate(branches, max(1, whole // self.stride), strided=whole < self.stride)

    def _residual(
        self, name: str, branches: tuple[Branch, ...], scale: float, num_blocks: int, x: jax.Array, train: bool
    ) -> jax.Array:
        apply_block = partial(_apply_block, train=train)
        apply_block = remat(apply_block) if self.remat else trace_blocks_once(apply_block)
        for i in range(1, num_blocks + 1):
            x = apply_block(ResidualBlock(branches, scale, **self._options, name=f"{name}_{i}"), x)
        return x
