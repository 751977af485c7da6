"""A baseline without a network: logistic regression on an 8x8 thumbnail. A network that does not beat it has learnt
position, size and brightness at most.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxa_jax.errors import UserError

THUMBNAIL_SIZE = 8
NUM_FOLDS = 5
INVERSE_REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # sklearn's C


def compute_thumbnail_features(
    images: ArrayLike, grid: tuple[int, int] = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
) -> np.ndarray:
    """Compute the area means of min-max normalised images on a grid, 8x8 by default; a constant image gives zeros.

    Args:
        images: uint8 [N, H, W, 1], at least a pixel for each cell; sides that are no multiples share pixels between
            cells by area.
        grid: (h, w), cells.

    Returns:
        float64 [N, h w] in [0, 1], rows of cells from the top.

    Raises:
        UserError: another rank, channels or type, or images of fewer pixels than cells.
    """
    images = np.asarray(images)
    bytes_of_grey = images.ndim == 4 and images.shape[-1] == 1 and images.dtype == np.uint8
    if not bytes_of_grey or images.shape[1] < grid[0] or images.shape[2] < grid[1]:
        raise UserError(
            f"images are {images.dtype} {images.shape}; needed is uint8 [N, H, W, 1] of at least {max(grid)} px"
        )
    low = images.min(axis=(1, 2, 3)).astype(np.float64)[:, None, None]
    high = images.max(axis=(1, 2, 3)).astype(np.float64)[:, None, None]
    vertical, horizontal = _area_means(images.shape[1], grid[0]), _area_means(images.shape[2], grid[1])
    means = np.empty((len(images), *grid))
    for row, image in enumerate(images[..., 0]):  # one by one: a float copy of all images would not fit
        means[row] = vertical @ image.astype(np.float64) @ horizontal.T
    spread = np.where(high > low, high - low, 1.0)
    return ((means - low) / spread).reshape(len(images), -1)


def make_thumbnails(images: Iterable[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """Return the area means float64 [N, h, w] of min-max normalised images uint8 [H, W, 1]: what needs no network."""
    rows = [compute_thumbnail_features(image[None], grid)[0] for image in images]
    return np.reshape(rows, (-1, *grid))


def _area_means(size_px: int, num_cells: int) -> np.ndarray:
    """Return the matrix [cells, size] whose rows average equal stretches of pixels."""
    edges = np.linspace(0, size_px, num_cells + 1)[:, None]
    pixels = np.arange(size_px)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.clip(overlap, 0, None) * (num_cells / size_px)


def fit_thumbnail_baseline(
    train_features: ArrayLike, train_labels: ArrayLike, train_patients: ArrayLike | None = None
) -> GridSearchCV:
    """Fit standardised logistic regression; its regularisation is chosen by cross-validated AUROC on these images.

    Deterministic: folds are not shuffled. Folds hold whole patients where patients are given.

    Args:
        train_features: [N, 64].
        train_labels: [N], 0 or 1.
        train_patients: [N], or None.

    Returns:
        A fitted classifier; `predict_proba(features)[:, 1]` are scores.

    Raises:
        UserError: rows that do not match, or a class with fewer than two patients.
    """
    features, labels = np.asarray(train_features), np.asarray(train_labels)
    patients = np.arange(len(labels)) if train_patients is None else np.asarray(train_patients)
    if not len(features) == len(labels) == len(patients):
        raise UserError(f"{len(features)} images, {len(labels)} labels, {len(patients)} patients: they must be as many")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(
        model,
        {"logisticregression__C": INVERSE_REGULARIZATIONS},
        scoring="roc_auc",
        cv=_make_folds(labels, patients),
    )
    with threadpool_limits(1):  # 64 columns: more threads only wait, and one gives the same bits on every machine
        return search.fit(features, labels)


def _make_folds(labels: np.ndarray, patients: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train rows, held-out rows) of up to five folds of whole patients, both classes on both sides."""
    num_folds = min(NUM_FOLDS, *(len(np.unique(patients[labels == label])) for label in (0, 1)))
    folds = list(StratifiedGroupKFold(num_folds).split(labels, labels, patients)) if num_folds > 1 else []
    folds = [fold for fold in folds if all(0 < labels[rows].sum() < len(rows) for rows in fold)]
    if not folds:
        raise UserError("the logistic regression needs training images of two patients of each class")
    return folds


def thumbnail_baseline(
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike,
    train_patients: ArrayLike | None = None,
) -> np.ndarray:
    """Return the baseline's scores [M] in [0, 1] of test images; nothing of them enters the fit.

    Args:
        train_images: uint8 [N, H, W, 1].
        train_labels: [N], 0 or 1.
        test_images: uint8 [M, H', W', 1]; another size than in training is allowed.
        train_patients: [N], or None.
    """
    model = fit_thumbnail_baseline(compute_thumbnail_features(train_images), train_labels, train_patients)
    return model.predict_proba(compute_thumbnail_features(test_images))[:, 1]
