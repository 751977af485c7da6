"""The cardiothoracic ratio of a chest X-ray, read by regressions that were fitted on drawings alone.

The ratio is the heart's widest transverse width over the thorax' widest inner width. A cascade of ridge regressions
finds it (supervised descent, Xiong and De la Torre 2013): the first looks at the whole of an average chest's place and
moves a box about the lungs, the next look at what that box holds, and the last reads the heart's edges in the lungs'
own frame, so that neither the chest's place nor its size in the picture matters. Contrast is taken out locally. All is
supervision from drawings (chest phantoms, whose masks are exact): no X-ray, no label and no radiologist's box enters.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.data.phantom_ratio import EDGES
from cxa_jax.errors import UserError
from cxa_jax.ridge import apply_ridge, fit_ridge

FILE = "cardiothoracic_ratio.json"
SOURCE = "ridge regressions fitted on drawings (chest phantoms with exact masks): no X-ray, label or box of one enters"
FRAME_PX = 64  # side that every image is brought to
DETAIL_PX, REACH_PX = 1.0, 8.0  # sd of the Gaussians: what is finer is noise; contrast is taken out within the other
CELLS = 16  # of the lungs' box along each side, with its margin
MARGIN = 0.2  # of the box' sides, seen on either side of it
NUM_STEPS = 3
ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
NUM_FOLDS = 5
PLAUSIBLE = (0.25, 0.9)
NUM_DIGITS = 6  # of a stored coefficient
_MIN_SIDE = 0.2  # of the image: no lungs' box is narrower or lower
_MAX_MOVE = 0.3  # of a box' side in a step


@dataclasses.dataclass(frozen=True)
class Stage:
    """One regression: standardised cells [CELLS^2] times `coefficients` [CELLS^2, K] plus `intercept` [K]."""

    coefficients: np.ndarray
    intercept: np.ndarray


@dataclasses.dataclass(frozen=True)
class RatioReader:
    """A fitted reader of the ratio.

    Attributes:
        start: float64 [4], the mean of the first four EDGES: where the search begins.
        steps: regressions from cells to moves of the lungs' box, as shares of its sides.
        heart: regression from cells to the heart's edges, as shares of the thorax' width from its left edge.
        facts: what it was fitted on and its error on other drawings; for files and reports.
    """

    start: np.ndarray
    steps: tuple[Stage, ...]
    heart: Stage
    facts: dict[str, Any]


def fit_ratio_reader(
    images: ArrayLike, edges: ArrayLike, num_steps: int = NUM_STEPS, facts: dict[str, Any] | None = None
) -> RatioReader:
    """Fit the cascade; deterministic. What a step moves in its fit is predicted by folds that did not see it.

    Args:
        images: uint8 [N, H, W, 1], one for each patient.
        edges: float64 [N, 6], their EDGES.
        num_steps: of the lungs' box.
        facts: kept with it.

    Raises:
        UserError: images and edges that do not fit together, or too few for the folds.
    """
    edges = np.asarray(edges, np.float64)
    if edges.shape != (len(images), len(EDGES)) or not np.isfinite(edges).all() or len(images) < 2 * NUM_FOLDS:
        raise UserError(f"{len(images)} images and edges {edges.shape}: needed are at least {2 * NUM_FOLDS}, six each")
    frames = np.stack([flatten_contrast(image) for image in images])
    start = _round(edges[:, :4].mean(axis=0))
    boxes, steps = np.tile(start, (len(edges), 1)), []
    with threadpool_limits(1):  # the same bits on every machine
        for _ in range(num_steps):
            stage, moves = _fit_stage(_read_cells(frames, boxes), (edges[:, :4] - boxes) / _sides(boxes))
            steps.append(stage)
            boxes = _move(boxes, moves)
        heart, _ = _fit_stage(_read_cells(frames, boxes), (edges[:, 4:] - boxes[:, :1]) / _sides(boxes)[:, :1])
    return RatioReader(start, tuple(steps), heart, facts or {})


def read_edges(reader: RatioReader, images: Iterable[np.ndarray]) -> np.ndarray:
    """Return the EDGES of images, float64 [N, 6], as fractions of the sides; nan for an image of one grey level.

    Args:
        reader: fitted on drawings.
        images: uint8 [H, W, 1] or [H, W] each, of any size.
    """
    frames = np.stack([flatten_contrast(image) for image in images])
    boxes = np.tile(reader.start, (len(frames), 1))
    with threadpool_limits(1):
        for step in reader.steps:
            boxes = _move(boxes, _apply(step, _read_cells(frames, boxes)))
        heart = boxes[:, :1] + _apply(reader.heart, _read_cells(frames, boxes)) * _sides(boxes)[:, :1]
    blank = np.ptp(frames, axis=(1, 2)) == 0
    return np.where(blank[:, None], np.nan, np.concatenate([boxes, heart], axis=1))


def compute_ratios(edges: ArrayLike) -> np.ndarray:
    """Return the cardiothoracic ratios [N] of EDGES [N, 6]: heart's over thorax' width, whatever comes out."""
    left, right, _, _, heart_left, heart_right = np.asarray(edges, np.float64).T
    return np.divide(heart_right - heart_left, right - left, out=np.full(left.shape, np.nan), where=right != left)


def find_fault(edges: ArrayLike) -> str | None:
    """Return in words why EDGES [6] give no ratio; None where they do. The ratio is held to PLAUSIBLE."""
    left, right, _, _, heart_left, heart_right = np.asarray(edges, np.float64)
    if not np.isfinite(edges).all():
        return "no edges found"
    if not (left < right and heart_left < heart_right):
        return "the edges cross"
    ratio = float(compute_ratios([edges])[0])
    return None if PLAUSIBLE[0] <= ratio <= PLAUSIBLE[1] else "{:.2f} is outside {} to {}".format(ratio, *PLAUSIBLE)


def read_ratios(reader: RatioReader, images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratios [N], nan where `find_fault` has a fault, and EDGES [N, 6]; arguments as of `read_edges`."""
    edges = read_edges(reader, images)
    return np.where([find_fault(row) is None for row in edges], compute_ratios(edges), np.nan), edges


def measure_image(reader: RatioReader, pixels: np.ndarray, width: int) -> tuple[dict[str, str], list[str]]:
    """Return what a table says of one image, and a warning where there is no plausible ratio; the cells are then empty.

    Args:
        reader: fitted on drawings.
        pixels: uint8 [S, S], the image as the network gets it.
        width: of its file, px.
    """
    edges = read_edges(reader, [pixels])[0]
    fault = find_fault(edges)
    if fault is not None:
        return dict.fromkeys(("cardiothoracic_ratio", "heart_width", "thorax_width"), ""), [f"ratio: {fault}"]
    thorax, heart = (float(edges[right] - edges[left]) * width for left, right in ((0, 1), (4, 5)))
    return {
        "cardiothoracic_ratio": f"{heart / thorax:.3f}",
        "heart_width": f"{heart:.1f}",
        "thorax_width": f"{thorax:.1f}",
    }, []


def flatten_contrast(image: np.ndarray) -> np.ndarray:
    """Return an image float32 [FRAME_PX, FRAME_PX] without contrast of its own; zeros for one grey level.

    The difference from the neighbourhood over the neighbourhood's standard deviation: exposure, gamma and local
    equalisation change it little, edges stay.
    """
    grey = np.asarray(image)
    if grey.ndim == 3 and grey.shape[-1] == 1:
        grey = grey[..., 0]
    if grey.ndim != 2 or grey.dtype != np.uint8:
        raise UserError(f"an image is {grey.dtype} {grey.shape}; needed is uint8 [H, W] or [H, W, 1]")
    small = Image.fromarray(grey).convert("F").resize((FRAME_PX, FRAME_PX), Image.Resampling.BOX)
    smooth = gaussian_filter(np.asarray(small, np.float64), DETAIL_PX)
    spread = smooth.std()
    if spread < 1e-6:
        return np.zeros((FRAME_PX, FRAME_PX), np.float32)
    away = smooth / spread - gaussian_filter(smooth / spread, REACH_PX)
    return (away / np.sqrt(gaussian_filter(away**2, REACH_PX) + 0.01)).astype(np.float32)


def save_ratio_reader(reader: RatioReader, folder: pathlib.Path) -> None:
    """Write `folder`/cardiothoracic_ratio.json, all or nothing."""
    with replace_when_written(folder / FILE) as neighbour:
        neighbour.write_text(dump_ratio_reader(reader), encoding="utf-8")


def load_ratio_reader(folder: pathlib.Path) -> RatioReader | None:
    """Read what `save_ratio_reader` wrote; None if it is not there; raises as `parse_ratio_reader`."""
    path = folder / FILE
    return parse_ratio_reader(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def dump_ratio_reader(reader: RatioReader) -> str:
    """Return a reader as JSON text."""
    stages = [
        {name: values.tolist() for name, values in vars(stage).items()} for stage in (*reader.steps, reader.heart)
    ]
    return (
        json.dumps({"source": SOURCE, "facts": reader.facts, "start": reader.start.tolist(), "stages": stages}) + "\n"
    )


def parse_ratio_reader(text: str, place: str) -> RatioReader:
    """Return the reader of a JSON text.

    Args:
        text: of `dump_ratio_reader`.
        place: where it stood, for the message.

    Raises:
        UserError: the text is damaged.
    """
    try:
        stored = json.loads(text)
        *steps, heart = [_parse_stage(stage) for stage in stored["stages"]]
        reader = RatioReader(np.array(stored["start"], np.float64), tuple(steps), heart, dict(stored["facts"]))
        shapes = [reader.start.shape, *(stage.intercept.shape for stage in (*steps, heart))]
        if shapes != [(4,), *[(4,)] * len(steps), (2,)] or not np.isfinite(reader.start).all():
            raise ValueError("it has other stages")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{place} is damaged ({error}); --mode=evaluate --config.eval.cardiothoracic_ratio=True writes it again"
        ) from error
    return reader


def _parse_stage(stored: dict[str, Any]) -> Stage:
    coefficients, intercept = (np.array(stored[name], np.float64) for name in ("coefficients", "intercept"))
    finite = np.isfinite(coefficients).all() and np.isfinite(intercept).all()
    if coefficients.shape != (CELLS**2, *intercept.shape) or not finite:
        raise ValueError(f"coefficients are {coefficients.shape}, not {CELLS**2} numbers for each edge")
    return Stage(coefficients, intercept)


def _fit_stage(cells: np.ndarray, targets: np.ndarray) -> tuple[Stage, np.ndarray]:
    """Return the regression of the alpha of the least held-out error, and its held-out predictions [N, K]."""
    held_out = np.empty((len(ALPHAS), *targets.shape))
    for fold, rest in KFold(NUM_FOLDS).split(cells):
        for index, fit in enumerate(fit_ridge(cells[fold], targets[fold], ALPHAS)):
            held_out[index, rest] = apply_ridge(cells[rest], *fit)
    best = int(np.argmin(np.sum((held_out - targets) ** 2, axis=(1, 2))))
    center, scale, coefficients, intercept = fit_ridge(cells, targets, [ALPHAS[best]])[0]
    coefficients = coefficients / scale[:, None]
    return Stage(_round(coefficients), _round(intercept - center @ coefficients)), held_out[best]


def _apply(stage: Stage, cells: np.ndarray) -> np.ndarray:
    return cells @ stage.coefficients + stage.intercept


def _read_cells(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the standardised cells [N, CELLS^2] of what boxes [N, 4] and their margins hold."""
    pad = FRAME_PX  # what lies outside repeats the edge
    cells = np.empty((len(frames), CELLS**2))
    for row, (frame, (left, right, top, bottom)) in enumerate(zip(frames, boxes, strict=True)):
        wide, high = MARGIN * (right - left), MARGIN * (bottom - top)
        corners = np.array([left - wide, top - high, right + wide, bottom + high]) * FRAME_PX + pad
        place = tuple(np.clip(corners, 0, FRAME_PX + 2 * pad).tolist())
        padded = Image.fromarray(np.pad(frame, pad, mode="edge"))
        seen = np.asarray(padded.resize((CELLS, CELLS), Image.Resampling.BILINEAR, box=place), np.float64).ravel()
        spread = seen.std()
        cells[row] = (seen - seen.mean()) / (spread if spread > 1e-6 else 1.0)
    return cells


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Return the width of boxes [N, 4] twice, and their height twice."""
    return np.repeat(boxes[:, [1, 3]] - boxes[:, [0, 2]], 2, axis=1)


def _move(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    moved = boxes + np.clip(moves, -_MAX_MOVE, _MAX_MOVE) * _sides(boxes)
    near = np.clip(moved[:, [0, 2]], -0.5, 1.0)
    far = np.clip(moved[:, [1, 3]], near + _MIN_SIDE, 1.5)
    return np.stack([near[:, 0], far[:, 0], near[:, 1], far[:, 1]], axis=1)


def _round(values: np.ndarray) -> np.ndarray:
    """Return numbers as the file has them, so that a reader is the same before and after."""
    digits = NUM_DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(values), 1e-12)))
    return np.array([round(float(v), int(d)) for v, d in zip(values.ravel(), digits.ravel(), strict=True)]).reshape(
        values.shape
    )
