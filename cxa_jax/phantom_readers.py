"""Readers of boxes that were fitted on the hearts of chest phantoms: a phantom run's own, or taken over for X-rays."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cxa_jax.box_reader import BoxReader, fit_readers, load_readers
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions
from cxa_jax.localization import BoxedImages
from cxa_jax.localization_table import RANDOM_WEIGHTS, is_control, split_control
from cxa_jax.run import Run
from cxa_jax.scored_maps import THUMBNAIL

log = logging.getLogger(__name__)

READERS_FILE = "box_readers.npz"


def fit_phantom_readers(
    run: Run, predictions: Predictions, boxed: BoxedImages, maps: Mapping[str, np.ndarray]
) -> dict[str, BoxReader] | None:
    """Fit readers to the boxed positives of a phantom's dev split; None on X-rays, whose boxes nothing is fitted to.

    Positives alone, though every phantom has a box: the images to be read are positives.
    """
    if not run.dataset.is_phantom or not len(boxed.rows):
        return None
    patients = predictions.index["patient"][boxed.rows]
    if len(np.unique(patients)) < 2:
        log.info("no reader of boxes: the dev split has positives of one patient alone")
        return None
    read = (None, RANDOM_WEIGHTS)  # the network's own maps and their untrained twins: what is made of them adds nothing
    inputs = {
        name: values
        for name, values in maps.items()
        if name == THUMBNAIL or (split_control(name)[0] in read and split_control(name)[1] in predictions.maps)
    }
    return fit_readers(inputs, boxed.boxes, patients, run.dataset.image_size)


def find_readers(run: Run, predictions: Predictions, fitted: dict[str, BoxReader] | None) -> dict[str, BoxReader]:
    """Return a phantom run's own readers, or for X-rays those of the run that the config names; empty without any.

    config.eval.levels_run is that run; where it is empty, config.init.run is. Its readers are refused, in words, where
    its maps have other cells or other names: the other numbers of the test stand without them.

    Args:
      run: what is evaluated.
      predictions: of its test split.
      fitted: `fit_phantom_readers` on its dev split.
    """
    folder = run.config.eval.levels_run or run.config.init.run
    if fitted is not None or run.dataset.is_phantom or not folder:
        return fitted or {}
    path = pathlib.Path(folder).expanduser() / READERS_FILE
    if not path.is_file():
        log.info("no reader of boxes was fitted on phantoms: %s is not there", path)
        return {}
    try:
        readers = load_readers(path)
        check_readers(readers, set(predictions.maps), predictions.attention.shape[1:])
    except UserError as error:
        log.warning("boxes are not read by the readers of %s: %s", folder, error)
        return {}
    return readers


def check_readers(readers: dict[str, BoxReader], maps: set[str], grid: tuple[int, int]) -> None:
    """Raise UserError unless readers were fitted on these maps, by name, and on this grid (h, w)."""
    grids = {reader.grid for reader in readers.values()}
    if grids != {grid}:
        have, *want = ("{}x{}".format(*size) for size in (grid, *sorted(grids)))
        raise UserError(
            f"they were fitted on maps of {', '.join(want)} cells, and these have {have}; take over from a phantom run "
            "of the same image size and stride"
        )
    known = {name for name, reader in readers.items() if reader.inputs == (name,) and not is_control(name)}
    if maps != known:
        raise UserError(
            f"they were fitted on the maps {', '.join(sorted(known))}, and these are {', '.join(sorted(maps))}; take "
            "over from a phantom run of the same pooling and head"
        )


def describe_readers(readers: dict[str, BoxReader]) -> dict[str, Any]:
    """Return what metrics.json says of readers."""
    return {
        name: {"inputs": reader.inputs, "grid": reader.grid, "alpha": reader.alpha, "num_images": reader.num_images}
        for name, reader in readers.items()
    }
