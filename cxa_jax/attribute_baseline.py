"""What view, sex and age alone say of the label: a logistic regression that sees no image."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cxa_jax.classification import short_interval
from cxa_jax.comparison import paired_bootstrap
from cxa_jax.errors import UserError
from cxa_jax.predictions import PredictionTable
from cxa_jax.statistics import bootstrap_interval
from cxa_jax.thumbnail import fit_thumbnail_baseline

log = logging.getLogger(__name__)

BY_LEVEL = ("view", "sex")
UNKNOWN = "unknown"
OLDEST = 150  # years, as strata have it
PROTOCOL = (
    "logistic regression on one-hot view and sex (what training images do not have is 'unknown') and standardised age "
    "with an indicator of a missing one, fitted to the training images; its regularisation by cross-validated AUROC in "
    "folds of whole patients. An attribute of one value in training is left out"
)


@dataclass(frozen=True)
class AttributeEncoder:
    """How attributes become columns, as training images have them.

    Attributes:
        levels: of view and sex, those of the training images and 'unknown', of each attribute that varies.
        age: (mean, standard deviation) of the known ages, years; None where they do not vary.
    """

    levels: dict[str, tuple[str, ...]]
    age: tuple[float, float] | None

    @classmethod
    def fit(cls, attributes: Mapping[str, np.ndarray]) -> Self:
        """Learn levels and scale from training images; `attributes` are text, age a number or text, [N] each."""
        levels = {}
        for name in BY_LEVEL:
            known = set(_read_levels(attributes.get(name, ())).tolist())
            if len(known) > 1:
                levels[name] = (*sorted(known - {UNKNOWN}), UNKNOWN)
        ages = _read_ages(attributes.get("age", ()))
        known = ages[np.isfinite(ages)]
        varied = len(known) > 0 and known.std() > 0
        return cls(levels, (float(known.mean()), float(known.std())) if varied else None)

    @property
    def known(self) -> tuple[str, ...]:
        """The attributes that say anything, in the order view, sex, age."""
        return (*self.levels, *(("age",) if self.age else ()))

    def encode(self, attributes: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Return the columns float64 [N, K] of some attributes; a level that training did not have is 'unknown'."""
        columns = []
        for name in names:
            if name == "age":
                ages, (mean, deviation) = _read_ages(attributes["age"]), self.age
                known = np.isfinite(ages)
                columns += [np.where(known, (np.where(known, ages, mean) - mean) / deviation, 0.0), ~known]
                continue
            values, levels = _read_levels(attributes[name]), self.levels[name]
            values = np.where(np.isin(values, levels), values, UNKNOWN)
            columns += [values == level for level in levels]
        return np.stack(columns, axis=1).astype(np.float64)


def _read_levels(values: Sequence[str]) -> np.ndarray:
    texts = np.char.strip(np.asarray(values, str))
    return np.where(texts == "", UNKNOWN, texts)


def _read_ages(values: Sequence[Any]) -> np.ndarray:
    """Return ages in years, nan where they are no number of a person."""
    ages = np.array([_to_number(value) for value in values], np.float64)
    return np.where((ages >= 0) & (ages < OLDEST), ages, np.nan)


def _to_number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def score_attributes(
    train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]
) -> dict[tuple[str, ...], np.ndarray]:
    """Fit a regression for each attribute alone and one for all, and return its scores of test images.

    Args:
        train: 'label', 'patient' and attributes of the training images, [N] each.
        test: attributes of the test images, [M] each; nothing of them enters a fit.

    Returns:
        Attributes -> scores [M] in [0, 1]; empty where none varies in training.

    Raises:
        UserError: a class of training images with fewer than two patients.
    """
    encoder = AttributeEncoder.fit(train)
    subsets = [(name,) for name in encoder.known]
    subsets += [encoder.known] if len(encoder.known) > 1 else []
    scores = {}
    for names in subsets:
        model = fit_thumbnail_baseline(encoder.encode(train, names), train["label"], train["patient"])
        scores[names] = model.predict_proba(encoder.encode(test, names))[:, 1]
    return scores


def describe_attribute_baseline(
    train: Mapping[str, np.ndarray], test: PredictionTable, *, num_resamples: int, seed: int
) -> dict[str, Any] | None:
    """Return the test AUROC of each attribute alone and of all together, and what the network has above these.

    Args:
        train: 'label', 'patient', 'view', 'sex', 'age' of the training images, [N] each.
        test: the network's scores on test, with attributes.
        num_resamples: of patients.
        seed: of the resamples.

    Returns:
        `known` attributes; AUROC by attribute in `alone`, `together`, and `network_above`: the network's AUROC less
        `together`, paired by patient. None where no attribute varies in training, or a class has too few patients.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    names = [name for name in (*BY_LEVEL, "age") if name in test.attributes]
    there = {name: train[name] for name in ("label", "patient", *names)}
    try:
        scores = score_attributes(there, test.attributes)
    except UserError as error:
        log.warning("no baseline of view, sex and age: %s", error)
        return None
    if not scores:
        log.info("no baseline of view, sex and age: the training images have one value of each")
        return None
    intervals = {
        names: short_interval(bootstrap_interval(test.label, values, test.patient, **options))
        for names, values in scores.items()
    }
    known = max(scores, key=len)
    above = paired_bootstrap(test.label, test.score, scores[known], test.patient, **options).difference
    return {
        "protocol": PROTOCOL,
        "known": list(known),
        "alone": {names[0]: interval for names, interval in intervals.items() if len(names) == 1},
        "together": intervals[known],
        "network_above": short_interval(above),
        "num_train_images": len(train["label"]),
    }
