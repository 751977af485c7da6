"""Foreign files to network input, on worker processes: a bad file is a result, not an end. Light to import."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cxa_jax.data.images import GreyImage, read_grey, resize_square
from cxa_jax.data.parallel import ordered_map
from cxa_jax.errors import UserError

DISPLAY_PX = 420  # longer side of the copy that pictures show
_CHUNK = 4


class InputImage(NamedTuple):
    """A file that was asked for.

    Attributes:
      path: as the user named it.
      image: what the network gets, or None.
      display: uint8 [h, w], the file's proportions, at most DISPLAY_PX; or None.
      error: why there is no image; '' if there is one.
    """

    path: pathlib.Path
    image: GreyImage | None
    display: np.ndarray | None
    error: str


def read_inputs(paths: Sequence[pathlib.Path], size: int, num_workers: int) -> Iterator[InputImage]:
    """Read files in order, each by the code that prepares training images (`images.load_grey`).

    Args:
      paths: the files.
      size: S, side of the network's input in px.
      num_workers: processes; 0 takes one for each core. At most eight files a process wait in memory.
    """
    chunks = [(paths[i : i + _CHUNK], size) for i in range(0, len(paths), _CHUNK)]
    workers = 1 if len(chunks) == 1 else num_workers
    return itertools.chain.from_iterable(ordered_map(_read_chunk, chunks, workers))


def _read_chunk(task: tuple[Sequence[pathlib.Path], int]) -> list[InputImage]:
    paths, size = task
    return [_read(path, size) for path in paths]


def _read(path: pathlib.Path, size: int) -> InputImage:
    try:
        pixels, mode, notes = read_grey(path)
    except UserError as error:
        return InputImage(path, None, None, str(error).removeprefix(f"{path}: "))
    height, width = pixels.shape
    image = GreyImage(resize_square(pixels, size), mode, width, height, notes)
    return InputImage(path, image, _shrink(pixels), "")


def _shrink(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape
    scale = DISPLAY_PX / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BILINEAR))
