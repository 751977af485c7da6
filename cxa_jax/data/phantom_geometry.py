"""Where the phantom's outlines run: pixels in the patient's frame, rib cage, diaphragm, lungs and the lungs' mask."""

from dataclasses import dataclass

import numpy as np

from cxa_jax.data.phantom import Latents


@dataclass(frozen=True)
class Grid:
    """Pixel centres in the patient's frame, and the outlines that several organs share; float32 [S, S] each."""

    x: np.ndarray
    y: np.ndarray
    abs_x: np.ndarray
    cage: np.ndarray  # half-width of the rib cage at this height; its maximum is T / 2
    edge: float  # width of a sharp edge


def make_grid(latents: Latents, size: int) -> Grid:
    """Return the pixels of an image of `size` x `size` px in the patient's frame."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    right, down = centres[None, :] - latents.shift[0], centres[:, None] - latents.shift[1]
    cos, sin = np.cos(latents.rotation).item(), np.sin(latents.rotation).item()
    scale = 1.0 / latents.magnification
    x, y = (right * cos + down * sin) * scale, (down * cos - right * sin) * scale
    build = latents.patient
    height = np.clip((y - build.apex) / (find_base(latents) - build.apex), 0.0, 1.0)
    cage = (0.5 * build.thoracic_width) * (1.0 - (1.0 - height) ** 2.2) ** build.cage_roundness
    edge_px = max(1.0, latents.sharpness_px * size / 224)
    return Grid(x, y, np.abs(x), cage, edge_px * 2.0 / size * scale)


def find_base(latents: Latents) -> float:
    """Return y of the costophrenic angles of this image."""
    return latents.patient.base + latents.inspiration


def find_dome(latents: Latents, grid: Grid) -> np.ndarray:
    """Return the height of the diaphragm: two domes, the right one (left in the image) higher."""
    build = latents.patient
    half = 0.5 * build.thoracic_width
    from_top = (grid.abs_x - 0.45 * half) / (0.55 * half)
    height = build.dome_height + np.where(grid.x < 0.0, build.dome_difference, 0.0)
    return find_base(latents) - height * (1.0 - from_top * from_top)


def measure_lung_depth(latents: Latents, grid: Grid) -> np.ndarray:
    """Return how far each pixel lies inside the lungs' sides and apices; the diaphragm is `find_dome`'s."""
    build = latents.patient
    medial = 0.115 + 0.05 * bump(grid.y - 0.10, 0.35) + 0.03 * bump(grid.y - build.apex, 0.15)
    return np.minimum(np.minimum(grid.cage - grid.abs_x, grid.abs_x - medial), grid.y - build.apex)


def draw_lung_mask(latents: Latents, size: int) -> np.ndarray:
    """Return the mask of both lungs, bool [size, size]: to the half height of their edges, the heart not cut out.

    The heart lies before the lungs, and their outer edges are what it leaves: its width is a share of the thorax's.
    """
    grid = make_grid(latents, size)
    return (measure_lung_depth(latents, grid) >= 0.0) & (find_dome(latents, grid) >= grid.y)


def bump(distance: np.ndarray, width: float) -> np.ndarray:
    """Return exp(-(distance / width)^2)."""
    return np.exp(-np.square(distance * (1.0 / width)))
