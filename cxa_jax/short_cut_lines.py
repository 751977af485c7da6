"""What a run's short cuts are, in a few plain lines: for the console and a report's first screen."""

from collections.abc import Callable
from typing import Any

from cxa_jax.localization_table import LEADING
from cxa_jax.map_energy import ALL
from cxa_jax.scored_maps import title_map


def write_short_cuts(short_cuts: dict[str, Any], form: Callable[[dict[str, float]], str]) -> list[str]:
    """Say what attributes alone, the heart greyed out and the heart alone reach; `form` writes an interval."""
    attributes, box = short_cuts["attributes"], short_cuts["heart_box"]
    lines = ["view, sex, age alone: not computed, the training images do not vary in any"]
    if attributes:
        lines = [
            f"{', '.join(attributes['known'])} alone, logistic regression: AUROC {form(attributes['together'])}; the "
            f"network above it {form(attributes['network_above'])}"
        ]
    if box is None:
        return [*lines, "heart greyed out, heart alone: not computed, no positive test image has a box"]
    parts = [
        f"{title}: AUROC {form(box[name])}, less the whole image's {form(box[f'{name}_less_whole'])}"
        for name, title in (("heart_greyed", "heart greyed out"), ("heart_alone", "heart alone"))
    ]
    basis = f"the median box of {box['num_boxed_patients']:,} patients, the same in every image"
    return [*lines, f"{'; '.join(parts)} ({basis})"]


def write_energy(short_cuts: dict[str, Any], form: Callable[[dict[str, float]], str]) -> list[str]:
    """Say how much of W and class evidence (else of the first map) lies in the median box, by view, if it is known."""
    known = [row for row in (short_cuts["energy"] or {"median_box": []})["median_box"] if row["maps"]]
    rows = [row for row in known if row["label"] == ALL]
    if not rows:
        return []
    names = [name for name in LEADING if name in rows[0]["maps"]] or list(rows[0]["maps"])[:1]
    lines = []
    for name in names:
        told = ", ".join(f"{row['view']} {form(row['maps'][name])}" for row in rows)
        lines.append(f"energy of {title_map(name)} in the median box, all test images (1 is chance): {told}")
    return lines
