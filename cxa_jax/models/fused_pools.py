"""Pools whose compiled gradients are slow on XLA:CPU, where select-and-scatter is serial; the same functions as Flax'.

The max pool keeps one byte an output for the backward pass. First-order gradients only.
"""

import jax
import jax.numpy as jnp
from jax import lax

WINDOW = [(i, j) for i in range(3) for j in range(3)]  # the cells of a 3x3 window, row by row


def max_pool_3x3(x: jax.Array, padding: int = 1) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 2: -> [B, h, w, C], h = (H + 2 padding - 3) // 2 + 1.

    The gradient of a window goes to its first maximum in row order, as XLA's select-and-scatter has it.

    Args:
      x: [B, H, W, C].
      padding: lines of -inf on each side.
    """
    ends = [2 * ((side + 2 * padding - 3) // 2) + 3 for side in x.shape[1:3]]  # one past what the last window reads
    lines = [(padding, end - padding - side, 0) for side, end in zip(x.shape[1:3], ends, strict=True)]
    return _max_pool(lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), *lines, (0, 0, 0)]))


@jax.custom_vjp
def _max_pool(x):
    return _max_and_cell(x)[0]


def _max_and_cell(x):
    """The maxima and, as uint8, the window's cell that holds each; H = 2 h + 1 and W = 2 w + 1."""
    rows, cols = x.shape[1] - 2, x.shape[2] - 2
    views = [x[:, i : i + rows : 2, j : j + cols : 2] for i, j in WINDOW]
    best, cell = views[0], jnp.zeros(views[0].shape, jnp.uint8)
    for k, view in enumerate(views[1:], start=1):
        cell = jnp.where(view > best, jnp.uint8(k), cell)
        best = jnp.maximum(best, view)
    return best, cell


def _max_pool_backward(cell, g):
    parts = [[jnp.where(cell == 3 * i + j, g, 0) for j in range(3)] for i in range(3)]
    return (_interleave([_interleave(row, axis=2) for row in parts], axis=1),)


def _interleave(parts, axis):
    """Lay the gradients of the window's first, middle and last cells along `axis` out on the input's grid.

    Window n covers inputs 2n, 2n + 1, 2n + 2: input 2n hears the first of window n and the last of window n - 1, input
    2n + 1 the middle of window n.
    """
    first, middle, last = parts
    zero = jnp.zeros_like(lax.slice_in_dim(first, 0, 1, axis=axis))
    even = jnp.concatenate([first, zero], axis) + jnp.concatenate([zero, last], axis)
    odd = jnp.concatenate([middle, zero], axis)
    both = jnp.stack([even, odd], axis + 1).reshape(*even.shape[:axis], 2 * even.shape[axis], *even.shape[axis + 1 :])
    return lax.slice_in_dim(both, 0, both.shape[axis] - 1, axis=axis)


_max_pool.defvjp(_max_and_cell, _max_pool_backward)


def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """Average [B, H, W, C] over 2x2 cells; an odd last row or column is dropped: -> [B, H//2, W//2, C]."""
    batch, height, width, channels = x.shape
    rows, cols = height // 2, width // 2
    return x[:, : 2 * rows, : 2 * cols].reshape(batch, rows, 2, cols, 2, channels).mean((2, 4))
