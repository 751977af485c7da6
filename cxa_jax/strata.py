"""Parts of a test set that a model may treat unlike: view, sex, age, cardiomegaly alone or with other findings."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

AGE_BANDS = ((0, 18), (18, 40), (40, 60), (60, 80), (80, 150))  # years, [low, high)
NO_FINDINGS = ("no finding", "", "nan")  # the last is what an empty cell becomes in other programs
MIN_PATIENTS = 10  # of each class: below, an interval says nothing and no number is given


@dataclass(frozen=True)
class Stratum:
    """Images that share a property: `by` names the property, `name` its value, `mask` [N] the images."""

    by: str
    name: str
    mask: np.ndarray


def find_strata(labels: ArrayLike, attributes: Mapping[str, np.ndarray]) -> list[Stratum]:
    """Split images by each of the attributes that are there.

    Args:
        labels: [N], 0 or 1.
        attributes: 'view', 'sex', 'age', 'findings', text or numbers [N]; findings are joined by '|'.

    Returns:
        Strata without images are left out. Images whose age is no number are in a stratum 'unknown'. By findings, the
        positives are split into those with cardiomegaly alone and with others; all negatives belong to both. Where
        some negatives have findings, these and those without any are two more, with all positives in both.
    """
    labels = np.asarray(labels)
    strata = []
    for name in ("view", "sex"):
        values = np.asarray(attributes.get(name, np.empty(0, str))).astype(str)
        strata += [Stratum(name, value or "unknown", values == value) for value in np.unique(values)]
    if "age" in attributes:
        ages = np.array([_to_age(value) for value in attributes["age"]])
        strata += [
            Stratum("age", f"{low}-{high - 1}" if high < 150 else f"{low}+", (ages >= low) & (ages < high))
            for low, high in AGE_BANDS
        ]
        strata.append(Stratum("age", "unknown", ~((ages >= 0) & (ages < 150))))
    if "findings" in attributes:
        findings = [str(value).strip().lower() for value in attributes["findings"]]
        alone = np.array([value == "cardiomegaly" for value in findings])
        strata.append(Stratum("positives", "cardiomegaly alone", alone | (labels == 0)))
        told = np.array([value not in NO_FINDINGS for value in findings])
        strata.append(Stratum("positives", "with other findings", (~alone & told) | (labels == 0)))
        others = told & np.array(["cardiomegaly" not in value for value in findings])
        if others[labels == 0].any():
            strata.append(Stratum("negatives", "no finding", ~others | (labels == 1)))
            strata.append(Stratum("negatives", "other findings", others | (labels == 1)))
    return [stratum for stratum in strata if stratum.mask.any()]


def _to_age(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def count_patients_by_class(labels: np.ndarray, patients: np.ndarray) -> tuple[int, int]:
    """Count the patients of negatives and of positives."""
    return tuple(len(np.unique(patients[labels == label])) for label in (0, 1))
