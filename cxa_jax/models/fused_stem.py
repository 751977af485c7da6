"""DenseNet's first convolution, 7x7 at stride 2 on three channels, as 4x4 at stride 1 on blocks of 2x2 pixels.

A GPU's library multiplies matrices with no fewer than eight channels: given three it pads them, and most of the product
is with zeros. On 2x2 blocks side by side there are twelve, 16 with a fourth, empty one a pixel. The output at p is
sum_d x[2p + d - 3] K[d], d = 0 ... 6. With a zero put before K (K'[d + 1] = K[d], K'[0] = 0) it is, axis by axis,

    sum_d x[2p + d - 4] K'[d], d = 2j + e,   =   sum_j sum_e x[2 (p + j - 2) + e] K'[2j + e],

a convolution with four cells j over blocks, whose channels are the pixels e. On a processor it does not pay.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cxa_jax.models.fused_convolutions import Pair

NUM_CHANNELS = 4  # of a pixel, the last one empty


def convolve_blocks(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[Pair], **options
) -> jax.Array:
    """Convolve [B, H, W, 3] with [7, 7, 3, D] at stride 2 and padding 3, in place of what nn.Conv calls.

    Args:
      x: images; with an odd H or W they are convolved as they are.
      kernel: [7, 7, 3, D].
      strides, padding, options: what nn.Conv hands over; (2, 2) and ((3, 3), (3, 3)).

    Returns:
      [B, H / 2, W / 2, D], rounded up.
    """
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    missing = (0, NUM_CHANNELS - channels)
    blocks = jnp.pad(x, ((0, 0), (0, 0), (0, 0), missing)).reshape(batch, height // 2, 2, width // 2, 2, NUM_CHANNELS)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * NUM_CHANNELS)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), missing, (0, 0))).reshape(4, 2, 4, 2, NUM_CHANNELS, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * NUM_CHANNELS, -1)
    return lax.conv_general_dilated(blocks, kernel, (1, 1), ((2, 1), (2, 1)), **options)
