"""Averaged copies: the network looks at shifted and zoomed copies of an image, and what it says of them is averaged.

Test-time augmentation, without chance: the copies are the first of a fixed list. A map of a copy is carried back to the
cells of the image before it counts. The average stays on these cells. A finer grid would hold little more, since the
maps of the other copies are interpolated on either, and every reader of a map would need its geometry.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxa_jax.data.augment import warp
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import compute_cell_centers

# Shifts along rows and columns, in units of `choose_copies`, and zoom. An odd number of copies leans to no side.
LIST = (
    (0, 0, 1.0),
    (1, 1, 1.0),
    (-1, -1, 1.0),
    (0, 0, 0.9),
    (0, 0, 1.1),
    (1, -1, 1.0),
    (-1, 1, 1.0),
    (0, 0, 0.95),
    (0, 0, 1.05),
)
MAX_COPIES = len(LIST)
LARGEST_SHIFT = 1 / 16  # of the side; training shifts by up to a tenth (config.augment.shift)

Look = Callable[[jax.Array], dict[str, jax.Array]]


class Copy(NamedTuple):
    """A copy whose pixel q shows pixel centre + zoom (q - centre) + shift of the image, as in `compose_affine`.

    Attributes:
      shift: (rows, columns) in px.
      zoom: above 1 shows more than the image, and so a smaller chest.
    """

    shift: tuple[float, float]
    zoom: float

    def find_start(self, axis: int, size_px: int) -> float:
        """Return the row (axis 0) or column of the image that pixel 0 of the copy shows."""
        return (1 - self.zoom) * (size_px - 1) / 2 + self.shift[axis]

    def compose(self, image_size: tuple[int, int]) -> np.ndarray:
        """Return the matrix [2, 3] from the copy's to the image's pixels, as `warp` takes it."""
        starts = [self.find_start(axis, side) for axis, side in enumerate(image_size)]
        return np.column_stack([self.zoom * np.eye(2), starts])


def choose_copies(num_copies: int, stride: int, image_size: tuple[int, int]) -> list[Copy]:
    """Return the first copies of the list: the image itself, then others by half a cell and by a zoom of .9 to 1.1.

    A shift is half of a cell, at most a sixteenth of the shorter side, in whole pixels: these are copied as they are.

    Args:
      num_copies: config.eval.num_copies.
      stride: px between cells.
      image_size: (H, W) in px.

    Raises:
      UserError: there are no so many copies.
    """
    if not 1 <= num_copies <= MAX_COPIES:
        raise UserError(f"config.eval.num_copies={num_copies} must be from 1 (the image alone) to {MAX_COPIES}")
    unit = max(1, min(stride // 2, int(LARGEST_SHIFT * min(image_size))))
    return [Copy((unit * rows, unit * columns), zoom) for rows, columns, zoom in LIST[:num_copies]]


def average_copies(look: Look, images: jax.Array, copies: Sequence[Copy], stride: int, offset: int) -> dict:
    """Let the network look at copies of images, one after the other, and average what it says.

    Logits and all else without cells are plain means over the copies. A cell of a map is the mean over the copies that
    show its place: not those that leave it out, nor those read there from a cell centred on filled pixels. Sums over
    cells, such as that of p, change a little: by what is left out at the border, and by zoom^2.

    Memory is that of one copy, time that of as many evaluations.

    Args:
      look: images [B, H, W, 1] -> outputs, of which those [B, h, w] are maps; compiled once.
      images: float32 [B, H, W, 1], normalised.
      copies: the first is the image itself, so that every cell is shown by one.
      stride: px between cells.
      offset: px of cell 0's centre.

    Returns:
      Outputs of the shapes of `look`.
    """
    if len(copies) == 1:
        return look(images)
    image_size = images.shape[1:3]
    matrices = jnp.array([copy.compose(image_size) for copy in copies], jnp.float32)
    seen = jax.lax.map(lambda matrix: look(jax.vmap(warp, (0, None))(images, matrix)), matrices)
    return {
        name: _average_maps(values, copies, image_size, stride, offset) if values.ndim == 4 else jnp.mean(values, 0)
        for name, values in seen.items()
    }


def _average_maps(
    maps: jax.Array, copies: Sequence[Copy], image_size: tuple[int, int], stride: int, offset: int
) -> jax.Array:
    """Carry maps [K, B, h, w] of the copies back to the image, and average them, [B, h, w]."""
    rows, columns = (
        np.stack([_read_back(copy, axis, maps.shape[2 + axis], image_size[axis], stride, offset) for copy in copies])
        for axis in (0, 1)
    )
    shown = np.einsum("ki,kj->ij", rows.sum(axis=2), columns.sum(axis=2))  # by how many copies, at least 1
    rows, columns = (jnp.asarray(matrices, maps.dtype) for matrices in (rows, columns))
    total = jnp.einsum("kip,kbpq,kjq->bij", rows, maps, columns, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.asarray(shown, maps.dtype)


def _read_back(copy: Copy, axis: int, num_cells: int, size_px: int, stride: int, offset: int) -> np.ndarray:
    """Return the matrix [h, h] that interpolates a copy's cells at the image's; a row of 0 where it shows none."""
    centers = compute_cell_centers(num_cells, stride, offset)
    start = copy.find_start(axis, size_px)
    looked_at = copy.zoom * centers + start  # px of the image
    low, high = min(-0.5, centers[0]), max(size_px - 0.5, centers[-1])
    inside = (low <= looked_at) & (looked_at <= high)
    position = ((centers - start) / copy.zoom - offset) / stride  # in cells of the copy
    left = np.clip(np.floor(position), 0, num_cells - 1).astype(int)
    right = np.minimum(left + 1, num_cells - 1)
    share = position - left
    known = (0 <= position) & (position <= num_cells - 1) & inside[left] & (inside[right] | (share == 0))
    matrix, cells = np.zeros((num_cells, num_cells)), np.arange(num_cells)
    matrix[cells, left] = (1 - share) * known
    matrix[cells, right] += share * known
    return matrix
