"""From a heat map to boxes: aligned bilinear upsampling, scaling to [0, 1], threshold rules, components.

No plotting, and nothing here sees a true box.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.special import logit

from cxa_jax.errors import UserError
from cxa_jax.map_mass import enclose_mass

WANG_LEVELS = (60 / 255, 180 / 255)
SCALINGS = ("unit", "min_max", "positive", "absolute", "logit")
COMPONENTS = ("largest", "all", "each")
LOGIT_EPSILON = 1e-6  # W is kept that far from 0 and 1, where float32 sigmoids end
TIE = 1e-9  # of a map's maximum: pixels that are nearer to each other than that are tied


class Rule(NamedTuple):
    """How boxes are cut off a scaled map.

    Attributes:
        kind: 'wang' (60 and 180 of 255, two masks), 'half_max' (at least half of the map's maximum), 'otsu' (above
            Otsu's level), 'level' (at least `value`), 'percentile' (above the `value`-th percentile of the pixels;
            where the strongest pixels are tied beyond it, those), 'mass' (the box beyond whose edges lie `shares` of
            the map's sum, the map raised to the power `value` first).
        value: of 'level' in (0, 1), of 'percentile' in (0, 100), of 'mass' above 0.
        components: the box of the 'largest' 8-connected component, one box about 'all' of them, a box for 'each'.
        scaling: of the map before it is cut, see `scale_map`; None: the map's own.
        shares: of 'mass': of the map's sum left of the box's left and right edge, and above its top and bottom edge.
    """

    kind: str
    value: float = 0.0
    components: str = "largest"
    scaling: str | None = None
    shares: tuple[float, ...] = ()


NAMED_RULES = {"wang": Rule("wang", components="each"), "half_max": Rule("half_max"), "otsu": Rule("otsu")}
RULES = tuple(NAMED_RULES)


def make_rule(rule: Rule | str | float) -> Rule:
    """Return a rule from its short form: a name of `RULES`, a level (0.3 or '0.3'), a percentile ('p85' or 'p85_all').

    Raises:
        UserError: unknown name, components or kind, or a value outside its range.
    """
    given = rule
    if isinstance(rule, str) and (found := re.fullmatch(r"p([0-9.]+)(?:_(\w+))?", rule)):
        rule = Rule("percentile", _parse_number(found[1]), found[2] or "largest")
    elif isinstance(rule, str):
        rule = NAMED_RULES.get(rule, Rule("level", _parse_number(rule)))
    elif not isinstance(rule, Rule):
        rule = Rule("level", float(rule))
    limits = {"level": 1, "percentile": 100}
    known = rule.kind in NAMED_RULES or 0 < rule.value < limits.get(rule.kind, 0) or _is_mass(rule)
    if not known or rule.components not in COMPONENTS:
        raise UserError(
            f"unknown threshold rule {given!r}; known are {', '.join(RULES)}, a level as a number between 0 and 1 such "
            "as 0.3, and a percentile as p and a number between 0 and 100 such as p85, or with its components "
            f"({', '.join(COMPONENTS)}) as p85_all; in Python also Rule 'mass' with four shares"
        )
    return rule


def read_rule(fields: Mapping[str, Any]) -> Rule:
    """Return the rule of a JSON object with its fields.

    Raises:
      UserError: there is no such rule.
      KeyError, TypeError: it lacks a field, or one is of another type.
    """
    return make_rule(Rule(**{name: fields[name] for name in Rule._fields})._replace(shares=tuple(fields["shares"])))


def _is_mass(rule: Rule) -> bool:
    left, right, top, bottom = rule.shares if len(rule.shares) == 4 else (0.0,) * 4
    return rule.kind == "mass" and rule.value > 0 and 0 < left < right < 1 and 0 < top < bottom < 1


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def describe_rule(rule: Rule) -> str:
    """Return a rule in words."""
    scaled = f", scaled {rule.scaling}" if rule.scaling else ""
    if rule.kind == "mass":
        left, right, top, bottom = (f"{share:.0%}" for share in rule.shares)
        mass = "the map's mass" if rule.value == 1 else f"the map's mass to the power {rule.value:g}"
        return f"edges at {left} and {right} of {mass} from the left, {top} and {bottom} from the top{scaled}"
    named = {"wang": "60 and 180 of 255", "half_max": "half the maximum", "otsu": "Otsu"}
    numbered = {"level": f"level {rule.value:g}", "percentile": f"percentile {rule.value:g}"}
    parts = {"largest": "largest component", "all": "one box about all components", "each": "every component"}
    return f"{(named | numbered)[rule.kind]}, {parts[rule.components]}{scaled}"


def compute_cell_centers(num_cells: int, stride: float, offset: float) -> np.ndarray:
    """Compute the pixel index of each cell's receptive-field centre: offset + stride * j, float64 [num_cells]."""
    return offset + stride * np.arange(num_cells, dtype=np.float64)


def _interpolation_matrix(size_px: int, num_cells: int, stride: float, offset: float) -> np.ndarray:
    cells = np.clip((np.arange(size_px) - offset) / stride, 0, num_cells - 1)  # beyond the outer centres: clamped
    left = np.minimum(np.floor(cells).astype(np.int64), max(num_cells - 2, 0))
    matrix = np.zeros((size_px, num_cells))
    rows = np.arange(size_px)
    matrix[rows, left] = 1 - (cells - left)
    matrix[rows, np.minimum(left + 1, num_cells - 1)] += cells - left
    return matrix


def upsample_maps(maps: ArrayLike, image_size: int | tuple[int, int], stride: float, offset: float) -> np.ndarray:
    """Upsample bilinearly so that cell j lies on pixel offset + stride * j; beyond the outer cells the edge goes on.

    pixel p reads the map at (p - offset) / stride. A plain resize would spread the cells over the whole image.

    Args:
        maps: [..., h, w].
        image_size: (H, W) or the side of a square, px of the image that the backbone saw.
        stride: px between cells (32).
        offset: px of cell 0's centre: 14 DenseNet, 0 ResNet-50, 37 Inception-ResNet-v2; 16 more undoes the half
            cell of the attention's 2x2 average pool.

    Returns:
        float64 [..., H, W].
    """
    maps = np.asarray(maps, np.float64)
    height, width = height_and_width(image_size)
    vertical = _interpolation_matrix(height, maps.shape[-2], stride, offset)
    horizontal = _interpolation_matrix(width, maps.shape[-1], stride, offset)
    return vertical @ maps @ horizontal.T


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of an image size given as such or as the side of a square."""
    return (image_size, image_size) if isinstance(image_size, int | np.integer) else tuple(image_size)


def scale_map(values: np.ndarray, scaling: str) -> np.ndarray:
    """Scale one map to [0, 1].

    Args:
        values: [H, W].
        scaling: 'unit' leaves W on its fixed scale of 0-1; 'min_max' stretches each map (p, unsigned maps), a
            constant one becomes 0; 'positive' cuts at 0 and divides by the maximum (signed evidence, CAM); 'absolute'
            divides magnitudes by their maximum (what speaks for and what against: both borders of a heart); 'logit'
            stretches log(W / (1 - W)), on which W's two ends count as much as its middle.

    Raises:
        UserError: unknown scaling, or 'unit' or 'logit' on values outside [0, 1].
    """
    low, high = float(values.min()), float(values.max())
    if scaling in ("unit", "logit") and (low < -1e-6 or high > 1 + 1e-6):
        raise UserError(f"scaling {scaling!r} is for maps in [0, 1]; this one spans [{low:.4g}, {high:.4g}]")
    if scaling == "unit":
        return np.clip(values, 0, 1)
    if scaling == "logit":
        return scale_map(logit(np.clip(values, LOGIT_EPSILON, 1 - LOGIT_EPSILON)), "min_max")
    if scaling == "min_max":
        return np.zeros_like(values) if is_flat(values) else (values - low) / (high - low)
    if scaling == "positive":
        return np.clip(values, 0, None) / high if high > 0 else np.zeros_like(values)
    if scaling == "absolute":
        largest = max(high, -low)
        return np.abs(values) / largest if largest > 0 else np.zeros_like(values)
    raise UserError(f"unknown scaling {scaling!r}; known are {', '.join(SCALINGS)}")


def is_flat(values: np.ndarray) -> bool:
    """Tell whether all values of a map are tied (`TIE`): it says nothing of where."""
    low, high = float(values.min()), float(values.max())
    return high - low <= TIE * max(abs(low), abs(high))


def compute_otsu_level(levels: np.ndarray) -> int:
    """Compute the byte t that maximises the variance between {<= t} and {> t} (Otsu 1979); levels uint8 [H, W]."""
    histogram = np.bincount(levels.ravel(), minlength=256) / levels.size
    weight = np.cumsum(histogram)
    moment = np.cumsum(histogram * np.arange(256))
    spread = weight * (1 - weight)
    gap = (moment[-1] * weight - moment) ** 2
    between = np.divide(gap, spread, out=np.zeros(256), where=spread > 1e-12)
    return int(np.argmax(between))


def threshold_map(values: np.ndarray, rule: Rule | str | float) -> list[np.ndarray]:
    """Return the masks [H, W] of a scaled map: two for 'wang' (60 and 180 of 255), one for the other rules.

    A map of one value everywhere says nothing of where: its masks are empty.

    Args:
        values: [H, W] in [0, 1].
        rule: see `Rule` and `make_rule`.

    Raises:
        UserError: see `make_rule`.
    """
    kind, value, *_ = make_rule(rule)
    if kind == "mass":
        raise UserError("the rule 'mass' cuts no mask off a map; detect_boxes has its box")
    if not says_where(values):
        return [np.zeros(values.shape, bool)]
    if kind == "wang":
        return [values >= level for level in WANG_LEVELS]
    if kind == "half_max":
        return [values >= values.max() / 2]
    if kind == "otsu":
        levels = np.round(values * 255).astype(np.uint8)  # in bytes, as CheXlocalize has it
        return [levels > compute_otsu_level(levels)]
    if kind == "percentile":
        return [cut_percentiles(values, [value])[0]]
    return [values >= value]


def cut_percentiles(values: np.ndarray, percentiles: ArrayLike) -> np.ndarray:
    """Return the masks [P, H, W] of the pixels above each percentile; where the top is tied beyond it, of the top.

    Args:
        values: [H, W] in [0, 1], not flat.
        percentiles: [P] in (0, 100), of the pixels.
    """
    top = values.max()
    levels = np.minimum(np.percentile(values, percentiles) + TIE * top, top * (1 - TIE))
    return values > levels[:, None, None]


def find_boxes(mask: np.ndarray) -> np.ndarray:
    """Return the tight boxes [K, 4] of a mask's 8-connected components, the one of most pixels first."""
    boxes, _, sizes = find_stacked_boxes(mask[None])
    return boxes[np.argsort(-sizes, kind="stable")]


def find_stacked_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the 8-connected components of each mask of a stack, several times as fast as one by one.

    Args:
        masks: bool [L, H, W].

    Returns:
        (tight boxes [K, 4], mask that each lies in [K], pixels [K]), by mask, then in the order of their first pixels.
    """
    within = np.zeros((3, 3, 3), bool)
    within[1] = True  # neighbours of the same mask alone
    components, count = ndimage.label(masks, structure=within)
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    ends = [(s[2].start, s[1].start, s[2].stop, s[1].stop, s[0].start) for s in ndimage.find_objects(components)]
    found = np.array(ends, np.int64).reshape(-1, 5)
    boxes = np.concatenate([found[:, :2], found[:, 2:4] - found[:, :2]], axis=1).astype(np.float64)
    return boxes, found[:, 4], sizes


def enclose(masks: np.ndarray) -> np.ndarray:
    """Return the tight box [L, 4] of all pixels of each mask [L, H, W]; nan where it has none."""
    ends = []
    for axis in (1, 2):  # over rows: columns
        hit = masks.any(axis=axis)
        ends.append((hit.argmax(axis=1), hit.shape[1] - hit[:, ::-1].argmax(axis=1)))
    (left, right), (top, bottom) = ends
    boxes = np.stack([left, top, right - left, bottom - top], axis=1).astype(np.float64)
    boxes[~masks.any(axis=(1, 2))] = np.nan
    return boxes


def says_where(values: np.ndarray) -> bool:
    """Tell whether a scaled map has anything, and not the same everywhere: else its boxes are a miss."""
    return bool(values.max() > 0) and not is_flat(values)


def detect_boxes(values: np.ndarray, rule: Rule | str | float) -> np.ndarray:
    """Return the detected boxes [K, 4] of a scaled map, of the components that the rule asks for; K = 0: a miss."""
    rule = make_rule(rule)
    if rule.kind == "mass":
        return enclose_mass(values, rule.value, rule.shares)[None] if says_where(values) else np.zeros((0, 4))
    masks = threshold_map(values, rule)
    if rule.components == "all":
        boxes = enclose(np.stack(masks))
        return boxes[np.isfinite(boxes[:, 0])]
    found = [find_boxes(mask) for mask in masks]
    return np.concatenate(found if rule.components == "each" else [boxes[:1] for boxes in found])
