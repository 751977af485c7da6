"""The dev split, drawn from the official training list, and the patients that splits share."""

import collections
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cxa_jax.errors import UserError

DEV_SPLITS = ("image", "patient")


def draw_dev_split(
    ids: Sequence[str], labels: Sequence[int], patients: Sequence[str], *, by: str, fraction: float, seed: int
) -> np.ndarray:
    """Choose the dev images: `fraction` of each class, rounded half up.

    Images, or patients, are ranked by a hash of (seed, name), so the draw depends neither on their order nor on the
    version of a random generator. 'image' takes the first of each class: exactly 171 + 5,050 of the paper's
    1,707 + 50,500 (R4), with patients on both sides. 'patient' walks down the patients, those with a positive image
    first, and takes whole patients while they fit into both classes' shares: no patient is on both sides.

    Args:
      ids: N image names, unique.
      labels: N labels, 0 or 1.
      patients: N patient names.
      by: 'image' (the paper's) or 'patient' (A23).
      fraction: Share of the images for dev, in (0, 1).
      seed: Draws the split.

    Returns:
      bool [N], True = dev.

    Raises:
      UserError: if `by` or `fraction` is out of range, or if one side would be left without one of the classes.
    """
    if by not in DEV_SPLITS:
        raise UserError(f"config.data.dev_split={by!r}: must be one of {', '.join(map(repr, DEV_SPLITS))}")
    if not 0 < fraction < 1:
        raise UserError(f"config.data.dev_fraction={fraction}: must lie between 0 and 1")
    labels = np.asarray(labels)
    quota = [int(fraction * np.sum(labels == label) + 0.5) for label in (0, 1)]
    draw = _draw_images if by == "image" else _draw_patients
    dev = draw(list(ids), labels, list(patients), quota, seed)
    _check_classes(labels, dev, fraction)
    return dev


def count_shared_patients(patients: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], int]:
    """Count the patients that any two splits have in common.

    Args:
      patients: Patient names of each split, one for each image; repetitions do not count.

    Returns:
      Number of shared patients for each pair of splits, in the mapping's order.
    """
    names = {split: set(members) for split, members in patients.items()}
    return {(a, b): len(names[a] & names[b]) for a, b in itertools.combinations(names, 2)}


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _draw_images(ids: list[str], labels: np.ndarray, patients: list[str], quota: list[int], seed: int) -> np.ndarray:
    del patients
    dev = np.zeros(len(ids), bool)
    for label in (0, 1):
        ranked = sorted(np.flatnonzero(labels == label), key=lambda i: _rank(seed, ids[i]))
        dev[ranked[: quota[label]]] = True
    return dev


def _draw_patients(ids: list[str], labels: np.ndarray, patients: list[str], quota: list[int], seed: int) -> np.ndarray:
    del ids
    counts = collections.defaultdict(lambda: [0, 0])
    for patient, label in zip(patients, labels, strict=True):
        counts[patient][label] += 1
    left = list(quota)
    chosen = set()
    # Positives are few: their patients go first, while the negatives they bring along still fit.
    for patient in sorted(counts, key=lambda name: (counts[name][1] == 0, _rank(seed, name))):
        negatives, positives = counts[patient]
        if negatives <= left[0] and positives <= left[1]:
            left = [left[0] - negatives, left[1] - positives]
            chosen.add(patient)
    return np.array([patient in chosen for patient in patients], bool)


def _check_classes(labels: np.ndarray, dev: np.ndarray, fraction: float) -> None:
    for name, side in (("dev", labels[dev]), ("train", labels[~dev])):
        for label in (0, 1):
            if not np.any(side == label):
                raise UserError(
                    f"the {name} split would hold no image of class {label} ({len(labels)} images on the training "
                    f"list, {np.sum(labels == 1)} positive): provide more images or change "
                    f"config.data.dev_fraction={fraction}"
                )
