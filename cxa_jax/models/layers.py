"""Convolution and normalisation as Keras applications builds them, and the check at a backbone's door."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.errors import UserError

GLOROT = nn.initializers.glorot_uniform()  # R11; Flax' own default is LeCun normal
BATCH_NORM_MOMENTUM = 0.99


def check_images(images: jax.Array, min_size: int, name: str) -> None:
    """Refuse images that a backbone cannot take; reads shape and type alone, so it costs nothing in a jitted step.

    Args:
      images: what should be float [B, H, W, 3], H, W >= min_size.
      min_size: px, the backbone's least image side.
      name: of the backbone, for the message.

    Raises:
      UserError: another rank, number of channels, size or type; the message has what was seen.
    """
    seen = f"got {images.dtype} {list(images.shape)}"
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{name} takes images [B, H, W, 3], {seen}; copy a grey channel three times")
    if min(images.shape[1:3]) < min_size:
        raise UserError(f"{name} needs images of at least {min_size} x {min_size} px, {seen}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"{name} takes floating-point images, {seen}; normalise first (cxa_jax.data.augment)")


def conv(
    num_features: int,
    kernel_size: int | Sequence[int] = 1,
    *,
    strides: int = 1,
    padding: str | int | Sequence = "SAME",
    use_bias: bool = False,
    dtype: Any = None,
    name: str | None = None,
) -> nn.Conv:
    """Create a convolution with a Glorot uniform kernel [kh, kw, C_in, num_features] and, if asked, a zero bias.

    `dtype` is the compute type; None takes that of inputs and parameters together.
    """
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    return nn.Conv(num_features, size, strides, padding, use_bias=use_bias, dtype=dtype, kernel_init=GLOROT, name=name)


def batch_norm(
    *,
    train: bool,
    epsilon: float,
    use_scale: bool = True,
    dtype: Any = None,
    name: str | None = None,
) -> nn.BatchNorm:
    """Create a batch norm: batch moments when `train`, running ones else; moments in float32 whatever `dtype`."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=epsilon,
        use_scale=use_scale,
        dtype=dtype,
        name=name,
    )


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 2, one pixel of padding on each side: Keras' ZeroPadding2D(1).

    The padding is -inf here and 0 in Keras: the same, because the pool always follows a ReLU.
    """
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
