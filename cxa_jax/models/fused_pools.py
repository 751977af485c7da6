"""Pools whose compiled gradients are slow on XLA:CPU, where select-and-scatter is serial; the same functions as Flax'.

The max pool keeps one byte an output for the backward pass. First-order gradients only.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cxa_jax.models import pool_kernel

WINDOW = [(i, j) for i in range(3) for j in range(3)]  # the cells of a 3x3 window, row by row


def max_pool_3x3(x: jax.Array, padding: int = 1, kernels: bool = False) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 2: -> [B, h, w, C], h = (H + 2 padding - 3) // 2 + 1.

    The gradient of a window goes to its first maximum in row order, as XLA's select-and-scatter has it.

    Args:
      x: [B, H, W, C].
      padding: lines of -inf on each side.
      kernels: on a GPU, the gradient by pool_kernel.py, where it takes the shape.
    """
    if kernels and padding == 1 and pool_kernel.takes(x.shape):
        return _max_pool_of_blocks(x)
    return _max_pool(_pad(x, padding))


def _pad(x, padding):
    """Lines of -inf on each side, so many behind that the last window is whole."""
    ends = [2 * ((side + 2 * padding - 3) // 2) + 3 for side in x.shape[1:3]]  # one past what the last window reads
    lines = [(padding, end - padding - side, 0) for side, end in zip(x.shape[1:3], ends, strict=True)]
    return lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *lines, (0, 0, 0)])


@jax.custom_vjp
def _max_pool(x):
    return _max_and_cell(x)[0]


def _max_and_cell(x, stride=2, dilation=1):
    """The maxima and, as uint8, the window's cell that holds each; at stride 2 H = 2 h + 1 and W = 2 w + 1."""
    rows, cols = x.shape[1] - 2 * dilation, x.shape[2] - 2 * dilation
    starts = [(i * dilation, j * dilation) for i, j in WINDOW]
    views = [x[:, i : i + rows : stride, j : j + cols : stride] for i, j in starts]
    best, cell = views[0], jnp.zeros(views[0].shape, jnp.uint8)
    for k, view in enumerate(views[1:], start=1):
        cell = jnp.where(view > best, jnp.uint8(k), cell)
        best = jnp.maximum(best, view)
    return best, cell


def _max_pool_backward(cell, g):
    """Input 2i + e of an axis lies in the windows i - a, a = 0 and 1, as their cell e + 2a, if that is one of three."""
    rows, cols = g.shape[1] + 1, g.shape[2] + 1
    total = 0
    for a, b in np.ndindex(2, 2):
        shift = [(0, 0, 0), (a, 1 - a, 0), (b, 1 - b, 0), (0, 0, 0)]
        own_cell, own_g = lax.pad(cell, np.uint8(pool_kernel.NO_CELL), shift), lax.pad(g, jnp.zeros((), g.dtype), shift)
        i, j = np.arange(2)[:, None] + 2 * a, np.arange(2) + 2 * b
        wanted = np.where((i < 3) & (j < 3), 3 * i + j, pool_kernel.NO_CELL + 1).astype(np.uint8)
        hit = own_cell[:, :, None, :, None] == wanted[:, None, :, None]
        total += jnp.where(hit, own_g[:, :, None, :, None], 0)
    total = total.reshape(g.shape[0], 2 * rows, 2 * cols, g.shape[3])
    return (total[:, :-1, :-1],)


_max_pool.defvjp(_max_and_cell, _max_pool_backward)


@jax.custom_vjp
def _max_pool_of_blocks(x):
    return _max_and_cell(_pad(x, 1))[0]


_max_pool_of_blocks.defvjp(lambda x: _max_and_cell(_pad(x, 1)), lambda cell, g: (pool_kernel.undo_max_pool(cell, g),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool_dilated(x: jax.Array, dilation: int) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 1, a window's cells `dilation` d apart: -> [B, H - 2d, W - 2d, C].

    The gradient of a window goes to its first maximum in row order, as that of `max_pool_3x3`.
    """
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, dilation, dilation, 1)
    )


def _max_pool_dilated_backward(dilation, cell, g):
    total = 0
    for k, (i, j) in enumerate(WINDOW):
        ends = [(0, 0), *((n * dilation, (2 - n) * dilation) for n in (i, j)), (0, 0)]
        total += jnp.pad(jnp.where(cell == k, g, 0), ends)
    return (total,)


max_pool_dilated.defvjp(lambda x, dilation: _max_and_cell(x, 1, dilation), _max_pool_dilated_backward)


@jax.custom_vjp
def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """Average [B, H, W, C] over 2x2 cells; an odd last row or column is dropped: -> [B, H//2, W//2, C].

    A sum of four views takes in whatever computes x; for a reduction XLA:CPU writes x, and a ReLU's zeros as an array
    of their own. First-order gradients only.
    """
    rows, cols = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return sum(x[:, i:rows:2, j:cols:2] for i in range(2) for j in range(2)) / 4


def _avg_pool_backward(x, g):
    batch, rows, cols, channels = g.shape
    g = jnp.broadcast_to(g[:, :, None, :, None] / 4, (batch, rows, 2, cols, 2, channels))
    odd = [(0, 0), (0, x.shape[1] - 2 * rows), (0, x.shape[2] - 2 * cols), (0, 0)]
    return (jnp.pad(g.reshape(batch, 2 * rows, 2 * cols, channels), odd),)


avg_pool_2x2.defvjp(lambda x: (avg_pool_2x2(x), x), _avg_pool_backward)  # of x, its shape alone


def avg_pool_to_phases(x: jax.Array) -> jax.Array:
    """Average 2x2 cells at stride 1 and deal the result out by rows and columns, even and odd: the four phases.

    Phase (a, b) of image i is image 4 i + 2 a + b and averages the 2x2 cells from (2 r + a, 2 c + b) on; cells beyond
    the edge are left out of the mean, an odd last row or column is dropped: [B, H, W, C] -> [4 B, H//2, W//2, C]. The
    phases of an image stay side by side, so that a batch that is shared by devices stays where it is.
    """
    batch, height, width, channels = x.shape
    rows, cols = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * cols]
    for axis in (1, 2):
        ahead = lax.slice_in_dim(x, 1, None, axis=axis), lax.slice_in_dim(x, -1, None, axis=axis)
        x = (x + lax.concatenate(ahead, axis)) / 2
    x = x.reshape(batch, rows, 2, cols, 2, channels).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(4 * batch, rows, cols, channels)


def merge_phases(x: jax.Array) -> jax.Array:
    """Put the four phases of each image back into one grid: [4 B, h, w, C] -> [B, 2 h, 2 w, C]."""
    phases, rows, cols, channels = x.shape
    x = x.reshape(phases // 4, 2, 2, rows, cols, channels).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(phases // 4, 2 * rows, 2 * cols, channels)
