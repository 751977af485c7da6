"""Some views of a data set: an AP film, taken at the bedside, is another kind of image than a PA film."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cxa_jax.errors import UserError

if TYPE_CHECKING:
    from cxa_jax.data.datasets import Dataset


class SelectedRows(Sequence):
    """Some rows of a source, each read when it is asked for."""

    def __init__(self, source: Sequence[dict[str, Any]], rows: np.ndarray):
        """Keep the rows' numbers; nothing is read yet."""
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._source[int(self._rows[row])]

    def read_image(self, row: int) -> np.ndarray:
        """Return the image of a row, uint8 [S, S, 1], as fast as the source can."""
        row = int(self._rows[row])
        return self._source.read_image(row) if hasattr(self._source, "read_image") else self._source[row]["image"]


def parse_views(text: str) -> tuple[str, ...]:
    """Return the views that config.data.views names, sorted: 'PA, AP' is AP and PA."""
    return tuple(sorted({view.strip() for view in text.split(",") if view.strip()}))


def describe_views(text: str) -> str:
    """Return what is said beside numbers: 'PA views alone'; '' where all views are in."""
    views = parse_views(text)
    return f"{' and '.join(views)} views alone" if views else ""


def select_views(dataset: "Dataset", text: str) -> "Dataset":
    """Keep the images of some views in every split.

    Args:
      dataset: whose index says the view of each image.
      text: config.data.views; '' keeps all.

    Returns:
      The data set, with a fingerprint of its own.

    Raises:
      UserError: the data know no views, none is of a view that is named, or a split is left without images or, for
        training, without one of the classes.
    """
    views = parse_views(text)
    if not views:
        return dataset
    known = sorted({str(view) for split in dataset.splits.values() for view in np.unique(split.index["view"])} - {""})
    field = f"config.data.views={text!r}"
    if not known:
        raise UserError(
            f"{field}: these data ({dataset.name}) know no views; set --config.data.views= for all images, or give a "
            "table of one's own images a column 'view'"
        )
    strangers = [view for view in views if view not in known]
    if strangers:
        raise UserError(f"{field}: no image is of the view '{strangers[0]}'; there are {', '.join(known)}")
    splits = {}
    for name, split in dataset.splits.items():
        rows = np.flatnonzero(np.isin(split.index["view"], views))
        index = {column: values[rows] for column, values in split.index.items()}
        if not len(rows) or (name == "train" and len(np.unique(index["label"])) < 2):
            lack = "no image" if not len(rows) else "one class alone"
            raise UserError(f"{field} leaves {lack} in {name}; name other views, or set --config.data.views= for all")
        splits[name] = dataclasses.replace(split, source=SelectedRows(split.source, rows), index=index)
    fingerprint = hashlib.sha256(f"{dataset.fingerprint}|{','.join(views)}".encode()).hexdigest()
    description = f"{dataset.description}; {describe_views(text)}"
    return dataclasses.replace(dataset, splits=splits, fingerprint=fingerprint, description=description, views=text)
