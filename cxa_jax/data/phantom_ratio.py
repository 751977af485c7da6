"""The cardiothoracic ratio of a drawing, measured on its masks as a radiologist does it on a film.

Numpy alone, so that worker processes start fast.
"""

import dataclasses

import numpy as np

from cxa_jax.data import phantom_render
from cxa_jax.data.phantom import Latents, PhantomSpec, sample_image
from cxa_jax.data.phantom_geometry import draw_lung_mask
from cxa_jax.errors import UserError

EDGES = ("thorax_left", "thorax_right", "lungs_top", "lungs_bottom", "heart_left", "heart_right")
THORAX_SHARES = (0.55, 0.95)  # of the image's width, in drawings that are posed anew: X-rays' chests fill more of it
MAX_MAGNIFICATION = 1.35  # more would cut the lungs off above and below
MAX_SHIFT = 0.15  # half image sides


def measure_edges(heart_mask: np.ndarray, lung_mask: np.ndarray) -> np.ndarray:
    """Return EDGES as fractions of the sides, float64 [6]; right and bottom are the far edges of their last pixels.

    The thorax' width is that of the row in which the lungs' outer edges are furthest apart, the first of equals. The
    heart's is between its outermost columns, whatever their rows: the transverse diameter is the sum of the greatest
    distances to either side of the midline (Danzer 1919).

    Args:
        heart_mask: [H, W], not zero in the heart.
        lung_mask: [H, W], not zero in the lungs.

    Raises:
        UserError: masks of two shapes, or an empty one.
    """
    heart, lungs = np.asarray(heart_mask) != 0, np.asarray(lung_mask) != 0
    if heart.shape != lungs.shape or heart.ndim != 2 or not heart.any() or not lungs.any():
        raise UserError(
            f"masks of heart {heart.shape} and lungs {lungs.shape}: needed are two of one shape, none empty"
        )
    height, width = lungs.shape
    rows = np.flatnonzero(lungs.any(axis=1))
    left, right = lungs[rows].argmax(axis=1), width - lungs[rows, ::-1].argmax(axis=1)
    widest = int(np.argmax(right - left))
    columns = np.flatnonzero(heart.any(axis=0))
    edges = (left[widest], right[widest], rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    return np.array(edges, np.float64) / (width, width, height, height, width, width)


def draw_measured(task: tuple[PhantomSpec, int, int, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the first image of a patient and measure it.

    Args:
        task: the population; the side of the image, px; the patient; whether he is posed anew, so that the thorax has
            a share of the width within THORAX_SHARES, as X-rays have it.

    Returns:
        The image, uint8 [S, S], and its EDGES.
    """
    spec, size, patient, posed = task
    latents = sample_image(spec, patient, 0)
    if posed:
        latents = _pose(latents, np.random.default_rng((spec.seed, patient)))
    image, heart_mask = phantom_render.render(latents, size)
    return image, measure_edges(heart_mask, draw_lung_mask(latents, size))


def _pose(latents: Latents, rng: np.random.Generator) -> Latents:
    width = latents.patient.thoracic_width
    magnification = min(2 * rng.uniform(*THORAX_SHARES) / width, MAX_MAGNIFICATION)
    room = min(MAX_SHIFT, 1 - magnification * width / 2)  # the thorax stays within the frame
    shift = rng.uniform(-room, room), rng.uniform(-MAX_SHIFT, MAX_SHIFT)
    return dataclasses.replace(latents, magnification=magnification, shift=shift)
