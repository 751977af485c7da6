"""Where a map's weight lies: the box beyond whose edges lie given shares of its sum.

A threshold asks where a map is high. Shares ask where most of it is, which a bright spot beside the place moves little,
and which changes smoothly with the map.
"""

import numpy as np
from numpy.typing import ArrayLike


def enclose_mass(values: np.ndarray, power: float, shares: ArrayLike) -> np.ndarray:
    """Return the box x, y, w, h [4], px, beyond whose edges lie given shares of a map's sum.

    Args:
        values: [H, W], non-negative, not all zero.
        power: that the map is raised to first; above 1 it weakens what is weak everywhere.
        shares: [4], of the sum left of the left and of the right edge, above the top and above the bottom edge.
    """
    rows, columns = locate_mass((values / values.max()) ** power, shares)  # so that no faint map vanishes
    left, right, top, bottom = *columns[:2], *rows[2:]
    return np.array([left, top, right - left, bottom - top])


def locate_mass(values: np.ndarray, shares: ArrayLike) -> np.ndarray:
    """Return the y and the x, px [2, Q], that each of Q shares of a map's sum lies above and left of.

    Within a pixel the map is constant, so places move continuously with shares.

    Args:
        values: [H, W], non-negative, not all zero.
        shares: [Q] in (0, 1).
    """
    places = []
    for axis in (1, 0):  # the sum over columns leaves rows
        total = np.concatenate([[0.0], np.cumsum(values.sum(axis=axis))])
        places.append(np.interp(np.asarray(shares) * total[-1], total, np.arange(len(total))))
    return np.array(places)
