"""Inception-ResNet-v2 without top (Szegedy et al. 2017), the graph of Keras applications (R16, R17, A18, A19)."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import check_images, check_implementation, conv, max_pool_3x3, norm, remat
from cxa_jax.models.tracing import trace_blocks_once

EPSILON = 1e-3


class Conv(NamedTuple):
    """One convolution of a branch; batch norm (no scale) and ReLU follow it."""

    num_features: int
    kernel_size: int | tuple[int, int] = 1
    strides: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """One 3x3 pool of a branch: 'max' at stride 2, valid, or 'avg' at stride 1, same."""

    kind: str


AVG_POOL, MAX_POOL = Pool("avg"), Pool("max")
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


class ConvNorm(nn.Module):
    """Convolution, batch norm without scale, ReLU: [B, H, W, C] -> [B, h, w, spec.num_features]."""

    spec: Conv
    dtype: Any = jnp.float32
    implementation: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        spec, options = self.spec._asdict(), {"dtype": self.dtype, "implementation": self.implementation}
        x = conv(spec.pop("num_features"), **spec, **options, name="conv")(x)
        return norm(x, relu=True, train=train, epsilon=EPSILON, use_scale=False, **options, name="norm")


class Branches(nn.Module):
    """Parallel chains of ConvNorms and pools, concatenated: [B, H, W, C] -> [B, h, w, sum of the branches' channels].

    Step i of branch b is the submodule `branch{b}_conv{i}`, counted from 1, pools left out.
    """

    branches: tuple[Branch, ...]
    dtype: Any = jnp.float32
    implementation: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return jnp.concatenate([self._chain(b, branch, x, train) for b, branch in enumerate(self.branches, 1)], axis=-1)

    def _chain(self, b: int, branch: Branch, x: jax.Array, train: bool) -> jax.Array:
        conv_norm = partial(ConvNorm, dtype=self.dtype, implementation=self.implementation)
        num_convs = 0
        for step in branch:
            if isinstance(step, Conv):
                num_convs += 1
                x = conv_norm(step, name=f"branch{b}_conv{num_convs}")(x, train=train)
            elif step == MAX_POOL:
                x = max_pool_3x3(x, padding=0, implementation=self.implementation)
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

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        options = {"dtype": self.dtype, "implementation": self.implementation}
        mixed = Branches(self.branches, **options, name="branches")(x, train=train)
        x = x + self.scale * conv(x.shape[-1], 1, use_bias=True, **options, name="conv")(mixed)
        return nn.relu(x) if self.relu else x


def _apply_block(block: ResidualBlock, x: jax.Array, *, train: bool) -> jax.Array:
    return block(x, train=train)


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2 features: images [B, H, W, 3] -> F [B, h, w, 1536], h = 5 at H = 224, H, W >= 75.

    Every strided layer is 'valid', so h is less than H / 32: (H - 43) // 32 for H = 75 and above.

    Attributes:
      num_blocks: residual blocks of the three kinds (35, 17 and 8 wide at H = 299).
      dtype: compute type; parameters and batch moments stay float32.
      implementation: 'plain' is Flax' layers; 'fused' the same function of the same variables, faster (layers.py).
      remat: recompute each residual block in the backward pass.
    """

    num_blocks: tuple[int, int, int] = (10, 20, 10)
    dtype: Any = jnp.float32
    implementation: str = "plain"
    remat: bool = False

    num_features = 1536  # channels C of the feature map
    stride = 32  # px between receptive-field centres of neighbouring cells
    offset = 37  # px, receptive-field centre of cell 0
    min_size = 75  # px, least side of an image, as Keras has it

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        check_images(images, self.min_size, type(self).__name__)
        check_implementation(self.implementation)
        branches = partial(Branches, **self._options)
        x = branches((STEM,), name="stem")(images, train=train)
        x = branches(MIXED_5B, name="mixed_5b")(x, train=train)
        x = self._residual("block35", BLOCK35, 0.17, self.num_blocks[0], x, train)
        x = branches(MIXED_6A, name="mixed_6a")(x, train=train)
        x = self._residual("block17", BLOCK17, 0.1, self.num_blocks[1], x, train)
        x = branches(MIXED_7A, name="mixed_7a")(x, train=train)
        x = self._residual("block8", BLOCK8, 0.2, self.num_blocks[2] - 1, x, train)
        last = ResidualBlock(BLOCK8, 1.0, relu=False, **self._options, name=f"block8_{self.num_blocks[2]}")
        x = last(x, train=train)
        return ConvNorm(Conv(self.num_features), **self._options, name="conv_7b")(x, train=train)

    @property
    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "implementation": self.implementation}

    def _residual(
        self, name: str, branches: tuple[Branch, ...], scale: float, num_blocks: int, x: jax.Array, train: bool
    ) -> jax.Array:
        apply_block = partial(_apply_block, train=train)
        apply_block = remat(apply_block) if self.remat else trace_blocks_once(apply_block)
        for i in range(1, num_blocks + 1):
            x = apply_block(ResidualBlock(branches, scale, **self._options, name=f"{name}_{i}"), x)
        return x
