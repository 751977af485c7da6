"""The gradient of the 3x3 max pool at stride 2 on a GPU: each pixel written once, by the program that owns it.

Seen from the input, padded by one line: pixels 2n and 2n + 1 of an axis form block n. The first is the middle cell (1)
of window n alone; the second is the last cell (2) of window n and the first (0) of window n + 1. So a block of 2x2
pixels hears from four windows, nine cells in all.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cxa_jax.models.kernel_tiles import choose_rows, interpret

ROWS = 32  # windows in a tile
CELLS = (((0, 1),), ((0, 2), (1, 0)))  # (window n or n + 1, its cell), for the first and the second pixel of a block
NO_CELL = 9  # where there is no window; one more stands for where no cell reaches
COMPILER = triton.CompilerParams(num_warps=4, num_stages=2)


def takes(shape: tuple[int, ...]) -> bool:
    """Return whether the kernel takes the gradient of a pool of [B, H, W, C]: H and W even, C a power of two."""
    return shape[0] > 0 and shape[1] % 2 == 0 and shape[2] % 2 == 0 and shape[3].bit_count() == 1


def undo_max_pool(cell: jax.Array, g: jax.Array) -> jax.Array:
    """Return the gradient [B, 2h, 2w, C] of the input, which was padded by one line.

    Args:
      cell: uint8 [B, h, w, C], which of its nine cells a window took, row by row.
      g: gradient of the maxima [B, h, w, C].
    """
    batch, height, width, channels = g.shape
    cell, g = cell.reshape(-1, channels), g.reshape(-1, channels)
    rows = choose_rows(g.shape[0], ROWS)
    out = pl.pallas_call(
        partial(_kernel, rows=rows, height=height, width=width),
        out_shape=jax.ShapeDtypeStruct((4 * g.shape[0], channels), g.dtype),
        grid=(g.shape[0] // rows,),
        compiler_params=COMPILER,
        interpret=interpret(),
        name="undo_max_pool",
    )(cell, g)
    return out.reshape(batch, 2 * height, 2 * width, channels)


def _kernel(cell_ref, g_ref, out_ref, *, rows, height, width):
    window = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    col, row = window % width, window // width  # the row counts through all images
    last = cell_ref.shape[0] - 1

    def load(down, right):
        inside = (row % height + down < height) & (col + right < width)
        index = jnp.minimum(window + down * width + right, last)
        return jnp.where(inside[:, None], cell_ref[index, :].astype(jnp.int32), NO_CELL), g_ref[index, :]

    windows = {(down, right): load(down, right) for down in (0, 1) for right in (0, 1)}
    for e, f in ((0, 0), (0, 1), (1, 0), (1, 1)):
        total = jnp.zeros((rows, cell_ref.shape[1]), jnp.promote_types(g_ref.dtype, jnp.float32))
        for down, i in CELLS[e]:
            for right, j in CELLS[f]:
                cell, g = windows[down, right]
                total += jnp.where(cell == 3 * i + j, g.astype(total.dtype), 0)
        out_ref[4 * width * row + 2 * width * e + 2 * col + f, :] = total.astype(out_ref.dtype)
