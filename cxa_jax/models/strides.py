"""The distance between neighbouring cells as a choice: which strides there are, and the two ways to it.

The networks end at 32 px a cell. Of finer ones 'cut' lets the network end after the last stage of that stride, so there
are fewer parameters and each cell sees less of the image. 'dilate' keeps all stages: where one would halve the grid it
stays, and what comes after is dilated (timm's `output_stride`). Parameters, imported weights and fields of view are the
whole network's, and so is, in evaluation, every (32 / stride)th cell along each axis, from cell 0 on.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cxa_jax.errors import UserError

STRIDES = (32, 16, 8)  # px; the first is the whole network's
STRIDE_BY = ("cut", "dilate")


def check_stride(stride: int, stride_by: str) -> None:
    """Raise UserError unless a backbone can have this stride in this way."""
    if stride not in STRIDES:
        raise UserError(f"config.model.stride={stride!r} is not one of {', '.join(map(str, STRIDES))}")
    if stride_by not in STRIDE_BY:
        raise UserError(f"config.model.stride_by={stride_by!r} is not one of {', '.join(STRIDE_BY)}")


def find_last_stride(stride: int, stride_by: str) -> int:
    """Return the stride in px that the last stage of this network has in the whole one: less than 32 if it is cut."""
    return stride if stride_by == "cut" else STRIDES[0]


def avg_pool_everywhere(x: jax.Array, spacing: int) -> jax.Array:
    """Average each cell of [B, H, W, C] with those `spacing` further down, right and both: a 2x2 pool of stride 1.

    Taps beyond the edge are left out of the mean. Sides are first cut to multiples of 2 * spacing: of cells that stand
    `spacing` times as dense as the whole network's, that drops what its 2x2 pool of stride 2 drops.
    """
    rows, cols = (side // (2 * spacing) * (2 * spacing) for side in x.shape[1:3])
    padding = ((0, 0), (0, spacing), (0, spacing), (0, 0))

    def add_up(x: jax.Array) -> jax.Array:
        taps = {"window_dimensions": (1, 2, 2, 1), "window_dilation": (1, spacing, spacing, 1)}
        return lax.reduce_window(x, 0.0, lax.add, window_strides=(1, 1, 1, 1), padding=padding, **taps)

    return add_up(x[:, :rows, :cols]) / add_up(jnp.ones((1, rows, cols, 1), x.dtype))
