"""The maps that are scored: what each is made of, how it is scaled, and what a reader calls it."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class MapKind(NamedTuple):
    """A map that is scored.

    Attributes:
        sources: names of the network's maps whose product it is.
        scaling: `heat_maps.scale_map`'s; W stands on its fixed scale, p is stretched, signed maps are cut at 0 or taken
            by magnitude.
        tuned_scalings: those that a rule tuned on phantoms may choose from.
        title: what a reader calls it.
    """

    sources: tuple[str, ...]
    scaling: str
    tuned_scalings: tuple[str, ...]
    title: str


def _make_signed(name: str, title: str, *sources: str) -> dict[str, MapKind]:
    """Return a signed map twice: what speaks for cardiomegaly, and magnitudes, which mark both borders of a heart."""
    return {
        name: MapKind(sources, "positive", ("positive",), title),
        f"{name}_absolute": MapKind(sources, "absolute", ("absolute",), f"{title}, magnitude"),
    }


THUMBNAIL = "thumbnail"  # a control: the image itself, by area means on the grid of the maps
ALL_MAPS, WITH_MAPS = "all_maps", "thumbnail_and_maps"  # what a fitted reader may read together
TOGETHER = {ALL_MAPS: "all maps together", WITH_MAPS: "thumbnail and all maps together"}

MAP_KINDS = {
    "attention": MapKind(("attention",), "unit", ("unit", "min_max", "logit"), "attention W"),
    "weights": MapKind(("weights",), "min_max", ("min_max",), "pooling weights p"),
    **_make_signed("evidence", "class evidence", "evidence"),
    **_make_signed("attended_evidence", "W x class evidence", "attention", "evidence"),
    **_make_signed("cam", "CAM", "cam"),
    "grad_cam": MapKind(("grad_cam",), "positive", ("positive",), "Grad-CAM"),
    THUMBNAIL: MapKind((THUMBNAIL,), "min_max", ("min_max",), "the image's thumbnail"),
}


def title_map(name: str) -> str:
    """Return what a reader calls a map, or maps that are read together."""
    return TOGETHER[name] if name in TOGETHER else MAP_KINDS[name].title


def derive_maps(maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every map of `MAP_KINDS` that the network's maps allow, each [N, h, w], signed as it is."""
    derived = {}
    for name, kind in MAP_KINDS.items():
        if all(source in maps for source in kind.sources):
            derived[name] = np.prod([np.asarray(maps[source], np.float64) for source in kind.sources], axis=0)
    return derived
