"""Controls that ask whether a map is only the prior: its mean, another patient's, and that of an untrained network."""

import logging
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.array_types import PyTree
from cxa_jax.data.datasets import Split
from cxa_jax.data.views import SelectedRows
from cxa_jax.evaluate import Predictions, evaluate_split
from cxa_jax.moments import fit_moments
from cxa_jax.run import Run
from cxa_jax.scored_maps import MAP_KINDS, derive_maps
from cxa_jax.sharding import put_replicated
from cxa_jax.steps import CONTROL
from cxa_jax.thumbnail import make_thumbnails

log = logging.getLogger(__name__)

NUM_AVERAGED = 256  # training images, of both classes, that a mean map is of
NUM_FITTED = 8  # training batches behind the moments of random weights, where the run itself recomputes none


class MapControls(NamedTuple):
    """What the controls of a run's maps are made from, drawn once.

    Attributes:
      random_weights: variables of a freshly initialised network (`draw_random_weights`).
      mean_maps: map -> [h, w] (`average_training_maps`), or None.
    """

    random_weights: PyTree
    mean_maps: dict[str, np.ndarray] | None


def draw_controls(run: Run, variables: PyTree) -> MapControls:
    """Draw the controls of a trained network's maps; `variables` are the network's, on its devices."""
    return MapControls(draw_random_weights(run), average_training_maps(run, variables))


def average_training_maps(run: Run, variables: PyTree) -> dict[str, np.ndarray] | None:
    """Compute the mean of each map over training images, evenly spaced in their order: what it shows of any image.

    Args:
      run: whose training images.
      variables: of the trained network, on its devices.

    Returns:
      map -> [h, w], of magnitudes where the map is scored by them; None without training images.
    """
    num_images = len(run.dataset.splits["train"].source)
    if not num_images:
        return None
    count = min(NUM_AVERAGED, num_images)
    rows = np.arange(count) * num_images // count
    derived = derive_maps(_predict_rows(run, variables, "train", rows).maps)
    return {
        name: (np.abs(maps) if MAP_KINDS[name].scaling == "absolute" else maps).mean(axis=0)
        for name, maps in derived.items()
    }


def draw_random_weights(run: Run) -> PyTree:
    """Draw the variables of a freshly initialised network, its batch norms with the moments of training images.

    With moments of 0 and 1 its activations would be no trained network's, and their maps no control.
    """
    variables = put_replicated(run.draw_state(jax.random.fold_in(run.root_key, CONTROL)).variables, run.mesh)
    if not len(run.dataset.splits["train"].source):
        log.warning(
            "the control of random weights has the moments of its draw: there are no training images for others"
        )
        return variables
    return fit_moments(run, variables, 0, run.config.train.recompute_moments or NUM_FITTED)


def predict_with_random_weights(
    run: Run, variables: PyTree, split_name: str, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the maps that `draw_random_weights` gives images: what architecture and position alone put into them."""
    predicted = _predict_rows(run, variables, split_name, rows)
    finite = {name: maps for name, maps in predicted.maps.items() if np.isfinite(maps).all()}
    if len(finite) < len(predicted.maps):
        log.warning("the freshly initialised network overflows: its maps are left out of the controls")
    return derive_maps(finite)


def collect_thumbnails(run: Run, predictions: Predictions, rows: np.ndarray) -> np.ndarray:
    """Return the images themselves on the grid of their maps, [N, h, w]."""
    split = run.dataset.splits[predictions.split]
    return make_thumbnails((split.read_image(int(row)) for row in rows), predictions.attention.shape[1:])


def _predict_rows(run: Run, variables: PyTree, split_name: str, rows: np.ndarray) -> Predictions:
    split = run.dataset.splits[split_name]
    index = {name: values[rows] for name, values in split.index.items()}
    return evaluate_split(
        run.test_step,
        variables,
        Split(split.name, SelectedRows(split.source, rows), index),
        run.mesh,
        batch_size=run.config.eval.batch_size,
        num_threads=0,
        show_progress=False,
    )


def draw_donors(patients: ArrayLike, seed: int) -> np.ndarray | None:
    """Draw for each image another patient's, with replacement: row numbers [N]; None where all are of one patient."""
    patients = np.asarray(patients)
    rng = np.random.default_rng(seed)
    others = [np.flatnonzero(patients != patient) for patient in patients]
    if not all(map(len, others)):
        return None
    return np.array([rng.choice(rows) for rows in others], np.int64)
