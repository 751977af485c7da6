"""What the training images look like in a few numbers, kept with the run: the ruler that foreign images are held to."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.companion_files import Folder
from cxa_jax.errors import UserError

FILE = "input_statistics.json"
MAX_IMAGES = 5000  # evenly spaced over the training split
THUMBNAIL_PX = 16
TAILS = (0.1, 99.9)  # percentiles of the training images: outside lies one of 500, by each number
NAMES = ("mean", "standard deviation", "5th percentile", "median", "95th percentile", "similarity")


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """The ruler.

    Attributes:
      thumbnail: float64 [16, 16], mean of the training images' thumbnails.
      ranges: for each of NAMES (low, high), the TAILS of the training images; grey levels 0-255, the last in [-1, 1].
      num_images: how many training images it was computed from.
      fingerprint: of the data set.
    """

    thumbnail: np.ndarray
    ranges: dict[str, tuple[float, float]]
    num_images: int
    fingerprint: str


def compute_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Shrink a grey image uint8 [S, S] to float64 [16, 16] by averaging over boxes."""
    small = Image.fromarray(pixels).convert("F").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def describe_image(pixels: np.ndarray, mean_thumbnail: np.ndarray) -> dict[str, float]:
    """Compute the NAMES of a grey image uint8 [S, S] as the network gets it.

    'similarity' is Pearson's correlation of its thumbnail with `mean_thumbnail` [16, 16]: an inverted image has the
    negative of its own. A constant image has 0.
    """
    levels = (pixels.mean(), pixels.std(), *np.percentile(pixels, (5, 50, 95)))
    similarity = correlate(compute_thumbnail(pixels), mean_thumbnail)
    return dict(zip(NAMES, (*map(float, levels), similarity), strict=True))


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Pearson's correlation of two arrays of one shape; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else 0.0


def compute_input_statistics(split: Any, fingerprint: str) -> InputStatistics:
    """Compute the ruler from a `datasets.Split`: two passes over at most MAX_IMAGES images, evenly spaced."""
    num_images = len(split.source)
    rows = np.unique(np.linspace(0, num_images - 1, min(num_images, MAX_IMAGES)).astype(int))
    thumbnail = np.mean([compute_thumbnail(split.read_image(int(row))[..., 0]) for row in rows], axis=0)
    described = [describe_image(split.read_image(int(row))[..., 0], thumbnail) for row in rows]
    ranges = {name: tuple(np.percentile([image[name] for image in described], TAILS).tolist()) for name in NAMES}
    return InputStatistics(thumbnail, ranges, len(rows), fingerprint)


def save_input_statistics(statistics: InputStatistics, folder: pathlib.Path) -> None:
    """Write `folder`/input_statistics.json, all or nothing."""
    text = json.dumps(dataclasses.asdict(statistics) | {"thumbnail": statistics.thumbnail.round(3).tolist()}, indent=1)
    with replace_when_written(folder / FILE) as neighbour:
        neighbour.write_text(text + "\n", encoding="utf-8")


def load_input_statistics(folder: Folder) -> InputStatistics | None:
    """Read what `save_input_statistics` wrote, also from a weights file; None if it is not there.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        thumbnail = np.array(stored["thumbnail"], np.float64).reshape(THUMBNAIL_PX, THUMBNAIL_PX)
        ranges = {name: (float(stored["ranges"][name][0]), float(stored["ranges"][name][1])) for name in NAMES}
        return InputStatistics(thumbnail, ranges, int(stored["num_images"]), str(stored["fingerprint"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); --mode=evaluate writes it again") from error
