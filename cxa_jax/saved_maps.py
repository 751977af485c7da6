"""Maps and X-rays of the images that a report draws, kept in one file: a report then needs neither network nor data."""

import pathlib
import zipfile
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.data.datasets import Split
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions

MAX_SIDE = 256  # px of a kept X-ray; larger ones are reduced, for drawing only
NUM_SHARED = 16  # of each class, drawn by chance from the ids: the same in every run on these data
NUM_WORST = 12  # lowest-scored positives and highest-scored negatives
MAX_BOXED = 400


@dataclass(frozen=True)
class SavedMaps:
    """Images of a split with their maps.

    Attributes:
        ids: text [N].
        images: uint8 [N, s, s], min-max stretched.
        boxes: float64 [N, 4] in px of the evaluated image; nan without one.
        maps: name -> float32 [N, h, w].
        image_size: px of the evaluated image.
        stride: px of it between cells.
        offset: px of cell 0's centre.
    """

    ids: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    maps: dict[str, np.ndarray]
    image_size: int
    stride: int
    offset: int

    def find(self, image_id: str) -> int | None:
        """Return the row of an image, or None."""
        found = np.flatnonzero(self.ids == image_id)
        return int(found[0]) if len(found) else None


def choose_rows(predictions: Predictions, boxed_rows: np.ndarray) -> np.ndarray:
    """Choose what to keep: boxed positives, a sample that depends on the ids alone, and the worst errors; sorted."""
    label = predictions.label
    rows = [boxed_rows[:MAX_BOXED]]
    for value in (1, 0):
        candidates = np.flatnonzero(label == value)
        rows.append(draw_shared_rows(np.asarray(predictions.index["id"]), label, value))
        order = candidates[np.argsort(predictions.logit[candidates], kind="stable")]
        rows.append(order[:NUM_WORST] if value else order[-NUM_WORST:])
    return np.unique(np.concatenate(rows))


def draw_shared_rows(ids: np.ndarray, labels: np.ndarray, label: int) -> np.ndarray:
    """Draw rows of one class by chance, from the ids alone: the same images whatever the model and the order."""
    candidates = np.flatnonzero(labels == label)
    by_id = candidates[np.argsort(ids[candidates])]
    return np.random.default_rng(0).permutation(by_id)[:NUM_SHARED]


def save_maps(
    path: pathlib.Path, predictions: Predictions, split: Split, rows: np.ndarray, stride: int, offset: int
) -> None:
    """Write the rows' X-rays, boxes and maps as a compressed npz, all or nothing."""
    records = [split.source[int(row)] for row in rows]
    boxes = [record["boxes"][0] if len(record["boxes"]) else np.full(4, np.nan) for record in records]
    arrays = {
        "ids": np.asarray(predictions.index["id"])[rows].astype(str),
        "images": np.stack([_reduce(record["image"][..., 0]) for record in records]),
        "boxes": np.array(boxes, np.float64),
        "geometry": np.array([records[0]["image"].shape[0], stride, offset]),
    }
    arrays |= {f"map_{name}": values[rows].astype(np.float32) for name, values in predictions.maps.items()}
    with replace_when_written(path) as neighbour, neighbour.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_maps(path: pathlib.Path) -> SavedMaps:
    """Read what `save_maps` wrote.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        image_size, stride, offset = (int(value) for value in arrays["geometry"])
        maps = {name.removeprefix("map_"): array for name, array in arrays.items() if name.startswith("map_")}
        return SavedMaps(arrays["ids"], arrays["images"], arrays["boxes"], maps, image_size, stride, offset)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); run --mode=evaluate again") from error


def _reduce(image: np.ndarray) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    stretched = (image.astype(np.float64) - low) * (255 / (high - low)) if high > low else np.zeros(image.shape)
    picture = np.round(stretched).astype(np.uint8)
    if max(picture.shape) <= MAX_SIDE:
        return picture
    return np.asarray(Image.fromarray(picture).resize((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX))
