"""Image files to 8-bit grey: one at a time, or many on all cores. Light to import: worker processes load it."""

import contextlib
import functools
import itertools
import os
import pathlib
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops

from cxa_jax.data.parallel import ordered_map
from cxa_jax.errors import UserError

# Pillow would hand PostScript to a program that runs it, whatever the file is called.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM", "JPEG2000")
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_GREY_MODES = (*_SIXTEEN_BIT_MODES, "1", "L", "LA", "F")
_RANGE_BITS = (8, 12, 16)  # what scanners and exporters put into a 16-bit file
UPRIGHT = 1  # EXIF's orientation
_CHUNK = 8  # images a task: large enough to hide the hand-over, small enough to bound memory
_COLOUR_SHARE, _COLOUR_LEVELS = 0.01, 16  # colour is more than this share of pixels with channels this far apart
# What Pillow's decoders raise for files that are cut, altered, or made to hurt: they trust what a file says.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, AttributeError, AssertionError, ArithmeticError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class GreyImage(NamedTuple):
    """One converted file: pixels uint8 [S, S], and what the file was.

    The latter are Pillow's mode ('DICOM ...' for DICOM), width and height in px, and notes: what is odd about the file.
    """

    pixels: np.ndarray
    mode: str
    width: int
    height: int
    notes: tuple[str, ...] = ()


def decode_grey(path: str | os.PathLike) -> tuple[np.ndarray, str]:
    """Read any image file as 8-bit grey.

    Colour becomes luminance (ITU-R 601, exact on grey copies); transparency is ignored: the RGBA files of ChestX-ray14
    are grey copies with full opacity. 16-bit files are divided by 1, 16 or 256: the smallest of 8, 12 and 16 bits that
    holds the file's maximum is taken as its range, since 12-bit X-rays are often stored in 16-bit files.

    Args:
      path: An image file of any mode and size; the first frame of several is taken.

    Returns:
      Pixels uint8 [H, W] and the file's mode ('L', 'RGBA', 'I;16', ...).

    Raises:
      UserError: if the file is missing, truncated, damaged or not an image, or holds floats or more than 16 bits.
    """
    return read_grey(path)[:2]


def read_grey(path: str | os.PathLike) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Read any image file as `decode_grey` does, DICOM too (`dicom.read_dicom`).

    Returns:
      Pixels uint8 [H, W], the file's mode, and notes: what is odd about it (colour, EXIF orientation, several
      frames, DICOM tags).
    """
    image, mode, notes = _read_grey_image(path)
    return np.asarray(image), mode, notes


def _read_grey_image(path: str | os.PathLike) -> tuple[Image.Image, str, tuple[str, ...]]:
    if is_dicom(path):
        from cxa_jax.data import dicom  # here: workers that see no DICOM do without pydicom

        pixels, mode, notes = dicom.read_dicom(path)
        if pixels.ndim == 3:
            return Image.fromarray(dicom.to_luminance(pixels)), mode, _note_colour(Image.fromarray(pixels)) + notes
        return Image.fromarray(pixels), mode, notes
    with _open_image(path) as image:
        image.load()
        grey, mode = _to_grey(image), image.mode
        notes = () if mode in _GREY_MODES else _note_colour(_without_palette(image))
        notes += _note_orientation(image)
        num_frames = getattr(image, "n_frames", 1)  # formats of one frame have no such attribute
        return grey, mode, notes if num_frames == 1 else (*notes, f"the first of {num_frames} frames")


def is_dicom(path: str | os.PathLike) -> bool:
    """Tell by its first bytes, or its name, whether a file is DICOM; False where there is no such file."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except (OSError, ValueError):  # the latter of a name with a zero byte
        return False
    return start[128:] == b"DICM" or os.fspath(path).lower().endswith(DICOM_SUFFIXES)


def measure_image(path: str | os.PathLike) -> tuple[int, int]:
    """Return a file's width and height in px from its header; raises UserError if it is not an image."""
    with _open_image(path) as image:
        return image.size


def resize_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize a grey image to a square: bilinear, antialiased when shrinking; nothing is cropped (Table 3, A15).

    Args:
      pixels: uint8 [H, W].
      size: S, the new side in px.

    Returns:
      uint8 [S, S]; the input itself where it already has that shape.
    """
    return pixels if pixels.shape == (size, size) else _resize(Image.fromarray(pixels), size)


def _resize(image: Image.Image, size: int) -> np.ndarray:
    # a size that fits is a copy to Pillow
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def load_grey(path: str | os.PathLike, size: int) -> GreyImage:
    """Read one file as grey [size, size], with its own mode and size; raises as `decode_grey`."""
    image, mode, notes = _read_grey_image(path)
    return GreyImage(_resize(image, size), mode, *image.size, notes)


def convert_images(paths: Sequence[pathlib.Path], size: int, num_workers: int) -> Iterator[GreyImage]:
    """Convert many files on several processes, in order, a bounded number ahead of the reader.

    Args:
      paths: The files.
      size: Side of the results in px.
      num_workers: Processes; 1 stays in this one, 0 takes one for each core. The results do not depend on it.

    Yields:
      One GreyImage for each path, in the order of `paths`.

    Raises:
      UserError: at the first file that cannot be read, after all the others were tried; it names every bad file.
    """
    chunks = [(paths[i : i + _CHUNK], size) for i in range(0, len(paths), _CHUNK)]
    results = itertools.chain.from_iterable(ordered_map(_convert_chunk, chunks, num_workers))
    for result in results:
        if isinstance(result, str):
            bad = [result, *(other for other in results if isinstance(other, str))]
            raise UserError(f"{len(bad)} of {len(paths)} images cannot be read; fetch them again:\n" + "\n".join(bad))
        yield result


def _convert_chunk(task: tuple[Sequence[pathlib.Path], int]) -> list[GreyImage | str]:
    paths, size = task
    return [_load_or_complain(path, size) for path in paths]


def _load_or_complain(path: pathlib.Path, size: int) -> GreyImage | str:
    try:
        return load_grey(path, size)
    except UserError as error:
        return str(error)


@contextlib.contextmanager
def _open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of damage that it passes over, and of large images
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except UserError:  # itself a ValueError
        raise
    except _UNREADABLE as error:
        raise UserError(f"{os.fspath(path)}: cannot be read as an image ({error})") from error


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_narrow(np.asarray(image)))
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    return _without_palette(image).convert("L")


def _without_palette(image: Image.Image) -> Image.Image:
    # A palette may be transparent: through RGBA, or Pillow warns and guesses.
    return image.convert("RGBA") if image.mode in ("P", "PA") else image


def _note_colour(image: Image.Image) -> tuple[str, ...]:
    # by Pillow's operations: a fourth of what numpy takes, and NIH ships some files as RGBA
    channels = (image if image.mode in ("RGB", "RGBA") else image.convert("RGB")).split()[:3]
    differences = [ImageChops.difference(one, other) for one, other in itertools.combinations(channels, 2)]
    if not any(difference.getbbox() for difference in differences):  # a grey copy
        return ()
    histogram = functools.reduce(ImageChops.lighter, differences).histogram()
    share = sum(histogram[_COLOUR_LEVELS + 1 :]) / (image.width * image.height)
    return (f"colour in {share:.0%} of the pixels, read as luminance",) if share > _COLOUR_SHARE else ()


def _note_orientation(image: Image.Image) -> tuple[str, ...]:
    """Tell of a camera's or viewer's wish to turn the picture: it is not granted, as NIH's files have none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except _UNREADABLE:  # of the header alone: the pixels were read
        return ()
    return () if orientation == UPRIGHT else (f"its EXIF orientation {orientation} is not applied",)


def _narrow(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} do not fit 16 bits")
    bits = next(bits for bits in _RANGE_BITS if int(pixels.max()) < 1 << bits)
    return (pixels.astype(np.uint16) >> (bits - 8)).astype(np.uint8)
