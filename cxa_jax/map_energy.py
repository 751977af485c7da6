"""How much of a map lies in a box, by view and label: a map that looks elsewhere on AP images shows it here."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cxa_jax.boxes import compute_coverage
from cxa_jax.classification import short_interval
from cxa_jax.group_statistics import bootstrap_group_means
from cxa_jax.heat_maps import scale_map, upsample_maps
from cxa_jax.localization import compute_energy_ratio
from cxa_jax.scored_maps import MAP_KINDS, derive_maps
from cxa_jax.strata import MIN_PATIENTS

ALL = "all"
CLASSES = {"negative": 0, "positive": 1}
NUM_AT_ONCE = 512  # images: products of maps of a whole split would not fit


def measure_energy(
    maps: Mapping[str, np.ndarray], box: ArrayLike, image_size: int, stride: float, offset: float
) -> dict[str, np.ndarray]:
    """Compute the energy ratio of every map inside one box, the same for all images.

    Args:
        maps: the network's, by name, [N, h, w] each.
        box: x, y, w, h, px.
        image_size: side of the image, px.
        stride: px between cells.
        offset: px of cell 0's centre.

    Returns:
        Map of `scored_maps.MAP_KINDS` -> [N]: share of its sum inside the box over the box's share of the image, so
        that 1 is chance; nan for a map of zeros.
    """
    region = compute_coverage(box, image_size, image_size)
    num_images = len(next(iter(maps.values()), ()))
    found: dict[str, list[float]] = {}
    for first in range(0, num_images, NUM_AT_ONCE):
        part = {name: values[first : first + NUM_AT_ONCE] for name, values in maps.items()}
        for name, cells in derive_maps(part).items():
            rows = (
                scale_map(upsample_maps(each, image_size, stride, offset), MAP_KINDS[name].scaling) for each in cells
            )
            found.setdefault(name, []).extend(compute_energy_ratio(values, region) for values in rows)
    return {name: np.array(values) for name, values in found.items()}


def describe_energy(
    energy: Mapping[str, np.ndarray], views: ArrayLike, labels: ArrayLike, patients: ArrayLike, **options: int
) -> list[dict[str, Any]]:
    """Return the mean energy ratio of every map, of all images and by view and label.

    Args:
        energy: map -> [N]; nan where not defined.
        views: [N], text.
        labels: [N], 0 or 1.
        patients: [N].
        **options: num_resamples, seed.

    Returns:
        One row for each `view` and `label`, 'all' first: `num_images`, `num_patients`, `too_small` (fewer than
        `MIN_PATIENTS` patients: no number is given) and `maps`, map -> interval.
    """
    patients, rows, columns = np.asarray(patients), [], {}
    for view, label, mask in _find_groups(np.asarray(views, str), np.asarray(labels)):
        counts = {"num_images": int(mask.sum()), "num_patients": len(np.unique(patients[mask]))}
        rows.append({"view": view, "label": label, **counts, "too_small": counts["num_patients"] < MIN_PATIENTS})
        if not rows[-1]["too_small"]:
            columns |= {(view, label, name): np.where(mask, values, np.nan) for name, values in energy.items()}
    found = bootstrap_group_means([columns], patients, dict.fromkeys(columns, "ratio"), **options) if columns else {}
    for row in rows:
        keys = {name: (row["view"], row["label"], name) for name in energy}
        row["maps"] = {name: short_interval(found[key]) for name, key in keys.items() if key in found}
    return rows


def _find_groups(views: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield view, label and mask; what all images share splits nothing."""
    known = {ALL: np.ones(len(views), bool)}
    if len(np.unique(views)) > 1:
        known |= {str(view) or "unknown": views == view for view in np.unique(views)}
    classes = {ALL: np.ones(len(labels), bool)}
    if len(np.unique(labels)) > 1:
        classes |= {name: labels == label for name, label in CLASSES.items()}
    for view, of_view in known.items():
        for name, of_class in classes.items():
            if (of_view & of_class).any():
                yield view, name, of_view & of_class
