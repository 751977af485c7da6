"""Read boxes off maps by ridge regression: cells in, edges out, fitted on the hearts of chest phantoms.

A regression finds a heart in almost anything that changes with it: in the image's thumbnail, or in maps of random
weights. So these are read the same way, and a map proves its network only by what it has above them.
"""

import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logit
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.boxes import check_boxes, compute_median_boxes
from cxa_jax.errors import UserError
from cxa_jax.heat_maps import LOGIT_EPSILON, height_and_width
from cxa_jax.localization import LocalizationScores, score_boxes
from cxa_jax.localization_table import RANDOM_WEIGHTS, READER, is_control
from cxa_jax.ridge import apply_ridge, fit_ridge
from cxa_jax.scored_maps import ALL_MAPS, THUMBNAIL, WITH_MAPS

ALPHAS = tuple(10 ** (power / 2) for power in range(-2, 11))  # of ridge regression, 0.1 to 100,000
NUM_FOLDS = 5


@dataclass(frozen=True)
class BoxReader:
    """A fitted regression from cells to the edges of a box.

    Attributes:
        inputs: names of the maps that are read, one after the other.
        grid: (h, w), cells of each.
        center: float64 [F], mean of each cell in the fit; F = number of inputs x h x w.
        scale: float64 [F], its standard deviation; 1 where it is constant.
        coefficients: float64 [F, 4], from standardised cells to left, top, right, bottom as fractions of the sides.
        intercept: float64 [4].
        alpha: of ALPHAS, the one of the least squared error on held-out patients.
        num_images: in the fit.
    """

    inputs: tuple[str, ...]
    grid: tuple[int, int]
    center: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    alpha: float
    num_images: int


def list_readers(maps: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return what there is to be fitted: reader -> its inputs. All maps together, too, and with the thumbnail.

    Args:
        maps: names of the maps there are, with those of random weights among them.
    """
    maps = list(maps)
    readers = {name: (name,) for name in (THUMBNAIL, *maps)}
    for prefix in ("", f"{RANDOM_WEIGHTS}_"):
        together = tuple(name for name in maps if is_control(name) == bool(prefix))
        if together:
            readers |= {prefix + ALL_MAPS: together, prefix + WITH_MAPS: (THUMBNAIL, *together)}
    return readers


def fit_reader(
    names: tuple[str, ...],
    maps: Mapping[str, ArrayLike],
    boxes: ArrayLike,
    patients: ArrayLike,
    image_size: int | tuple[int, int],
) -> BoxReader:
    """Fit ridge regression from standardised cells to the edges; its alpha by folds of whole patients.

    Deterministic. It wants images like those that it is to read: fitted on positives it reads positives better than
    one fitted on all of their split, three times as many (thumbnails of 64 px phantoms: mean IoU .822 against .803).

    Args:
        names: of the maps to read.
        maps: name -> [N, h, w], finite, one grid for all; W in [0, 1].
        boxes: [N, 4] x, y, w, h in px.
        patients: [N].
        image_size: (H, W) or the side of a square, px.

    Raises:
        UserError: maps, boxes and patients that do not fit together, a map with nan, or fewer than two patients.
    """
    features, grid = _flatten(names, maps)
    boxes, patients = check_boxes(boxes, *height_and_width(image_size)), np.asarray(patients)
    if not len(features) == len(boxes) == len(patients):
        raise UserError(f"{len(features)} maps, {len(boxes)} boxes, {len(patients)} patients: they must be as many")
    num_folds = min(NUM_FOLDS, len(np.unique(patients)))
    if num_folds < 2:
        raise UserError(f"a reader of boxes needs images of two patients to be fitted on; there are {num_folds}")
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / _sides(image_size)
    with threadpool_limits(1):  # the same bits on every machine
        errors = np.zeros(len(ALPHAS))
        for fold, held_out in GroupKFold(num_folds).split(features, groups=patients):
            for index, fit in enumerate(fit_ridge(features[fold], edges[fold], ALPHAS)):
                errors[index] += np.sum((apply_ridge(features[held_out], *fit) - edges[held_out]) ** 2)
        alpha = ALPHAS[int(np.argmin(errors))]
        fit = fit_ridge(features, edges, [alpha])[0]
    return BoxReader(tuple(names), grid, *fit, alpha=alpha, num_images=len(features))


def read_boxes(reader: BoxReader, maps: Mapping[str, ArrayLike], image_size: int | tuple[int, int]) -> np.ndarray:
    """Return boxes [N, 4] x, y, w, h in px, inside the image and at least a pixel wide and high.

    Args:
        reader: fitted on images of any size, on the same grid.
        maps: name -> [N, h, w]; others than the reader's are ignored.
        image_size: (H, W) or the side of a square, px.

    Raises:
        UserError: a map that the reader needs is not there, has another grid, or holds nan.
    """
    missing = [name for name in reader.inputs if name not in maps]
    if missing:
        raise UserError(f"the reader of boxes was fitted on maps that are not here: {', '.join(missing)}")
    features, grid = _flatten(reader.inputs, maps)
    if grid != reader.grid:
        have, want = ("{}x{}".format(*size) for size in (grid, reader.grid))
        raise UserError(f"maps have {have} cells, and the reader of boxes was fitted on {want}: it needs the same grid")
    with threadpool_limits(1):
        edges = apply_ridge(features, reader.center, reader.scale, reader.coefficients, reader.intercept)
    edges, sides = edges * _sides(image_size), _sides(image_size)[:2]
    low = np.clip(np.minimum(edges[:, :2], edges[:, 2:]), 0, sides - 1)
    high = np.clip(np.maximum(edges[:, :2], edges[:, 2:]), low + 1, sides)
    return np.concatenate([low, high - low], axis=1)


def fit_readers(
    maps: Mapping[str, ArrayLike], boxes: ArrayLike, patients: ArrayLike, image_size: int | tuple[int, int]
) -> dict[str, BoxReader]:
    """Fit every reader of `list_readers`; arguments and errors as of `fit_reader`, with a map named THUMBNAIL."""
    wanted = list_readers(name for name in maps if name != THUMBNAIL)
    return {name: fit_reader(inputs, maps, boxes, patients, image_size) for name, inputs in wanted.items()}


def score_readers(
    readers: Mapping[str, BoxReader],
    maps: Mapping[str, ArrayLike],
    boxes: ArrayLike,
    patients: ArrayLike,
    image_size: int | tuple[int, int],
) -> dict[tuple[str, str], LocalizationScores]:
    """Score the boxes that readers read off maps, beside the median box, as rows of the rule READER.

    Readers of a map that is not there, such as one of a single value everywhere, are left out.

    Args:
        readers: reader -> as fitted.
        maps: name -> [N, h, w].
        boxes: [N, 4] the true ones, px; nothing is fitted to them.
        patients: [N].
        image_size: (H, W) or the side of a square, px.

    Returns:
        (reader or control, READER) -> scores; without energies, which a box has not.
    """
    median = compute_median_boxes(boxes, patients)
    predicted = {
        name: read_boxes(reader, maps, image_size)
        for name, reader in readers.items()
        if all(source in maps for source in reader.inputs)
    }
    return {(name, READER): score_boxes(guess, boxes, patients) for name, guess in predicted.items()} | {
        ("median_box", READER): score_boxes(median, boxes, patients)
    }


def save_readers(path: pathlib.Path, readers: Mapping[str, BoxReader] | None) -> None:
    """Write readers as one npz, all or nothing; without any, remove an earlier test's file, which others would read."""
    if not readers:
        path.unlink(missing_ok=True)
        return
    arrays = {f"{name}.{field}": value for name, reader in readers.items() for field, value in vars(reader).items()}
    with replace_when_written(path) as neighbour, neighbour.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_readers(path: pathlib.Path) -> dict[str, BoxReader]:
    """Read what `save_readers` wrote.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        names = [key.removesuffix(".inputs") for key in arrays if key.endswith(".inputs")]
        return {name: _unpack({key: arrays[f"{name}.{key}"] for key in BoxReader.__annotations__}) for name in names}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate that run again") from error


def _unpack(arrays: dict[str, np.ndarray]) -> BoxReader:
    inputs, grid = tuple(arrays["inputs"].tolist()), tuple(int(cells) for cells in arrays["grid"])
    num_features = len(inputs) * int(np.prod(grid))
    shapes = {"center": (num_features,), "scale": (num_features,), "coefficients": (num_features, 4), "intercept": (4,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} of {', '.join(inputs)} is not {shape} numbers")
    numbers = {name: arrays[name].astype(np.float64) for name in shapes}
    return BoxReader(inputs, grid, **numbers, alpha=float(arrays["alpha"]), num_images=int(arrays["num_images"]))


def _flatten(names: Iterable[str], maps: Mapping[str, ArrayLike]) -> tuple[np.ndarray, tuple[int, int]]:
    columns = []
    for name in names:
        values = np.asarray(maps[name], np.float64)
        if values.ndim != 3 or not np.isfinite(values).all():
            raise UserError(f"map {name!r} is {values.shape}; needed is [N, h, w] without nan or infinity")
        if name.removeprefix(f"{RANDOM_WEIGHTS}_") == "attention":  # read as z, which has what a saturated W hides
            values = logit(np.clip(values, LOGIT_EPSILON, 1 - LOGIT_EPSILON))
        columns.append(values)
    if len({values.shape for values in columns}) != 1:
        raise UserError(f"maps have several shapes: {', '.join(str(values.shape) for values in columns)}")
    return np.concatenate([values.reshape(len(values), -1) for values in columns], axis=1), columns[0].shape[1:]


def _sides(image_size: int | tuple[int, int]) -> np.ndarray:
    height, width = height_and_width(image_size)
    return np.array([width, height, width, height], np.float64)
