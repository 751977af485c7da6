"""Boxes by shares of a map's mass in plain loops: the slow twin of the rule 'mass' and of what tunes it."""

import numpy as np

from cxa_jax.heat_maps import Rule
from cxa_jax.map_rules import POWERS, SHARES


def find_edge(profile, share: float) -> float:
    """Return where the running sum of a profile reaches a share of its total, evenly spread within each pixel."""
    wanted, passed = share * sum(profile), 0.0
    for pixel, weight in enumerate(profile):
        if weight > 0 and passed + weight >= wanted:
            return pixel + (wanted - passed) / weight
        passed += weight
    raise AssertionError("the share is beyond the profile")


def find_profiles(values: np.ndarray, power: float) -> tuple[list[float], list[float]]:
    """Return the sums of values^power over each column and over each row."""
    height, width = values.shape
    columns = [sum(float(values[row, column]) ** power for row in range(height)) for column in range(width)]
    rows = [sum(float(values[row, column]) ** power for column in range(width)) for row in range(height)]
    return columns, rows


def enclose_mass(values: np.ndarray, power: float, shares) -> list[float]:
    """Return x, y, w, h."""
    columns, rows = find_profiles(values, power)
    left, right = (find_edge(columns, share) for share in shares[:2])
    top, bottom = (find_edge(rows, share) for share in shares[2:])
    return [left, top, right - left, bottom - top]


def choose_shares(maps, boxes: np.ndarray, power: float) -> list[float]:
    """Return for left, right, top, bottom the share whose places lie nearest to the true edges; maps scaled [H, W]."""
    profiles, chosen = [find_profiles(values, power) for values in maps], []
    x, y, w, h = boxes.T
    for axis, edges in ((0, x), (0, x + w), (1, y), (1, y + h)):
        distances = []
        for share in SHARES:
            found = [find_edge(of_map[axis], share) for of_map in profiles]
            distances.append(sum(abs(place - edge) for place, edge in zip(found, edges, strict=True)))
        chosen.append(float(SHARES[int(np.argmin(distances))]))
    return chosen


def list_rules(maps, boxes: np.ndarray) -> list[Rule]:
    """Return the rule of each power that makes boxes, tuned on the maps that are not of one value."""
    speaking = [row for row, values in enumerate(maps) if values.max() > values.min()]
    rules = []
    for power in POWERS:
        left, right, top, bottom = choose_shares([maps[row] for row in speaking], boxes[speaking], power)
        if left < right and top < bottom:
            rules.append(Rule("mass", power, shares=(left, right, top, bottom)))
    return rules
