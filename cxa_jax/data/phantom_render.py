"""Drawing of the chest phantom: latents to pixels, in numpy alone so that worker processes start fast.

A frontal film is a map of how much the rays were weakened. The drawing adds up thicknesses (tissue, bone, heart),
takes away air (lungs, trachea, stomach), and then exposes: the mean and the contrast of every image are set to draws
that know nothing of the label, so that neither brightness nor contrast can stand for the heart's size.
"""

from dataclasses import dataclass

import numpy as np

from cxa_jax.data import phantom
from cxa_jax.data.phantom import Latents, PhantomSpec
from cxa_jax.data.phantom_boxes import tight_box
from cxa_jax.data.phantom_geometry import Grid, bump, find_base, find_dome, make_grid, measure_lung_depth

_LETTERS = {  # of the lead markers, on the side of the patient that they name
    -1: np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 0, 1]], bool),  # R
    1: np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]], bool),  # L
}


@dataclass(frozen=True)
class Drawing:
    """One finished image with its truth.

    Attributes:
        image: uint8 [S, S].
        heart_mask: uint8 [S, S], 1 where the pixel's centre is inside the heart.
        box: x, y, w, h, px, of the heart's mask or, as radiologists draw it, of the cardiac silhouette.
        latents: what it was drawn from.
    """

    image: np.ndarray
    heart_mask: np.ndarray
    box: tuple[int, int, int, int]
    latents: Latents


def draw(spec: PhantomSpec, size: int, key: tuple[int, int], box: str = "mask") -> Drawing:
    """Draw one image, alone and from nothing but its key.

    Args:
        spec: the population.
        size: side of the image, px.
        key: number of the patient, and of the image within the patient.
        box: one of `phantom_boxes.BOXES`; image and mask are the same with any.
    """
    latents = phantom.sample_image(spec, *key)
    pixels, mask = render(latents, size)
    outline = mask if box == "mask" else mask | (_trunk_depth(make_grid(latents, size)) >= 0.0)
    return Drawing(pixels, mask, tight_box(outline), latents)


def render(latents: Latents, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render the latents.

    Args:
        latents: all that the drawing depends on.
        size: side of the image, px.

    Returns:
        The image, uint8 [size, size], and the heart's mask, uint8 0/1 [size, size].
    """
    rng = np.random.default_rng(latents.texture_key)
    grid = make_grid(latents, size)
    chest = _soft_tissue(latents, grid) - _stomach(latents, grid) + _mediastinum(latents, grid) - 0.10 * _airways(grid)
    chest += _bones(latents, grid) + _breasts(latents, grid) + _devices(latents, grid) + _gradient(latents, size)
    air = _lungs(latents, grid) * (latents.aeration - _lung_texture(rng, grid))
    radius = _heart_radius(latents, grid, latents.ctr)
    density = chest + _heart_shadow(radius, grid, air)
    reference = chest + _heart_shadow(_heart_radius(latents, grid, phantom.CTR_THRESHOLD), grid, air)
    image = _match_histogram(density, reference, _inside(grid.cage + 0.05 - grid.abs_x, 0.2))
    return _expose(latents, rng, image), (radius <= 1.0).astype(np.uint8)


def _inside(distance: np.ndarray, width: float) -> np.ndarray:
    """Return 1 where `distance` is well above zero, 0 well below, a straight ramp of `width` between."""
    return np.clip(distance * (1.0 / width) + 0.5, 0.0, 1.0)


def _noise_grid(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return bilinear noise at fractional lattice positions; `rows`, `columns` broadcast, within `shape` - 1."""
    lattice = rng.standard_normal(shape, dtype=np.float32)
    i, j = rows.astype(np.int32), columns.astype(np.int32)
    u, v = rows - i, columns - j
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    upper = lattice[i, j] * (1.0 - v) + lattice[i, j + 1] * v
    lower = lattice[i + 1, j] * (1.0 - v) + lattice[i + 1, j + 1] * v
    return upper * (1.0 - u) + lower * u


def _heart_radius(latents: Latents, grid: Grid, ctr: float) -> np.ndarray:
    """Return the elliptic radius of every pixel, below 1 inside a heart whose width is exactly CTR x T."""
    build = latents.patient
    cos, sin = np.cos(build.heart_angle).item(), np.sin(build.heart_angle).item()
    width = ctr * build.thoracic_width
    major = 0.5 * width / np.hypot(cos, build.heart_aspect * sin).item()
    minor = build.heart_aspect * major
    half_height = np.hypot(major * sin, minor * cos).item()
    x = grid.x - (build.heart_left_share - 0.5) * width
    y = grid.y - (find_base(latents) + build.heart_depth - half_height)
    return np.hypot((x * cos + y * sin) / major, (y * cos - x * sin) / minor)


def _heart_shadow(radius: np.ndarray, grid: Grid, air: np.ndarray) -> np.ndarray:
    """Return what heart and lungs do to the density: the heart's muscle takes the place of air."""
    heart = _inside(0.4 * (1.0 - radius), grid.edge)  # 0.4: about the ellipse's half axis, which turns radius to length
    return 0.10 * heart * np.sqrt(np.maximum(1.0 - radius * radius, 0.0)) - air * (1.0 - heart)


def _match_histogram(density: np.ndarray, reference: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Map the trunk's grey levels towards those of the reference: the same chest with a heart on the decision line.

    A wider heart leaves fewer dark pixels; without this the histogram alone would tell the label. 0.7 of the way is
    enough, since aeration and exposure vary; all the way, the hila of small hearts would shine. The arms and the
    background hold no part of the heart: mapped too, their brightness would tell it instead.
    """
    trunk = weight > 0.5
    source, target = np.sort(density[trunk]), np.sort(reference[trunk])
    levels = np.linspace(0, source.size - 1, 129).round().astype(int)
    mapped = np.interp(density, source[levels], target[levels]).astype(np.float32)
    return density + 0.7 * weight * (mapped - density)


def _soft_tissue(latents: Latents, grid: Grid) -> np.ndarray:
    """Return the body without its air: an elliptic cylinder from the neck over the shoulders to the belly."""
    build = latents.patient
    torso = 0.5 * build.thoracic_width + build.chest_wall + 0.05 * grid.y
    shoulder = _inside(grid.y - (build.apex - 0.02), 0.50)
    axilla = _inside(grid.y - (build.apex + 0.62), 0.70)
    half_width = 0.24 + shoulder * shoulder * (1.00 - (1.24 - torso) * axilla)
    across = np.sqrt(np.maximum(1.0 - np.square(grid.x / half_width), 0.0))
    thickness = 0.80 + 0.20 * _inside(grid.y, 1.2)
    return thickness * across * _inside(half_width - grid.abs_x, 2.0 * grid.edge)


def _lungs(latents: Latents, grid: Grid) -> np.ndarray:
    """Return the air in the way of each ray, of [0, 1]."""
    outline = measure_lung_depth(latents, grid)
    above = _inside(find_dome(latents, grid) - grid.y, grid.edge)
    lateral = grid.abs_x / np.maximum(grid.cage, 0.05)
    depth = 0.55 + 0.45 * np.sqrt(np.maximum(1.0 - np.square(np.minimum(lateral, 1.0)), 0.0))
    return _inside(outline, 1.5 * grid.edge) * above * depth


def _lung_texture(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Return vessels that leave the hila as rays and thin out, on a mottled ground."""
    side = np.where(grid.x < 0.0, 0, 1)
    dx, dy = grid.abs_x - 0.13, grid.y + 0.04 + 0.03 * side
    distance = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx) * (12.0 / np.pi) + 12.0
    waver = _noise_grid(rng, np.minimum(distance * 6.0, 10.0), angle * 0.25 + 7.0 * side, (12, 15))
    columns = np.clip(angle + 0.8 * waver, 0.0, 24.0) + 26.0 * side
    rays = _noise_grid(rng, np.minimum(distance * 5.0, 10.0), columns, (12, 53))
    vessels = np.clip(1.0 - 2.2 * np.abs(rays), 0.0, 1.0) * np.clip(1.0 - distance / 0.75, 0.0, 1.0)
    ground = _noise_grid(rng, np.clip(4.0 * grid.y + 7.0, 0.0, 14.0), np.clip(4.0 * grid.x + 7.0, 0.0, 14.0), (16, 16))
    return 0.17 * vessels + 0.22 * bump(distance, 0.15) + 0.03 * ground


def _mediastinum(latents: Latents, grid: Grid) -> np.ndarray:
    """Return aortic arch, great vessels, and the column of tissue behind the sternum."""
    ageing = (latents.patient.age - 20) / 70
    knob = _inside(0.085 + 0.02 * ageing - np.hypot(grid.x - 0.10, (grid.y + 0.30) * 0.9), 0.07)
    trunk = _inside(_trunk_depth(grid), 0.08)
    column = bump(grid.x - 0.01, 0.17) * _inside(grid.y + 0.65, 0.4)
    return (0.08 + 0.12 * ageing) * knob + 0.10 * trunk + 0.05 * column


def _trunk_depth(grid: Grid) -> np.ndarray:
    return 0.13 - np.hypot(grid.x - 0.08, grid.y + 0.10)


def _airways(grid: Grid) -> np.ndarray:
    """Return the trachea and the two main bronchi."""
    below = grid.y + 0.26
    centre = 0.75 * np.maximum(below, 0.0)
    ends = _inside(-0.08 - grid.y, 0.12)
    return bump(np.abs(grid.abs_x - centre), 0.035) * ends


def _stomach(latents: Latents, grid: Grid) -> np.ndarray:
    below = grid.y - (find_base(latents) + 0.08)
    return latents.patient.stomach_bubble * _inside(0.10 - np.hypot((grid.x - 0.38) * 0.7, below), 0.06)


def _bones(latents: Latents, grid: Grid) -> np.ndarray:
    """Return spine, posterior and anterior ribs, and clavicles."""
    build = latents.patient
    vertebrae = bump(grid.x, 0.085) * (0.10 + 0.025 * np.cos(grid.y * 36.0 + 6.0 * build.rib_phase))
    lateral = grid.abs_x * (2.0 / build.thoracic_width)
    spacing = build.num_ribs / (find_base(latents) - build.apex + 0.25)
    chest = _inside(grid.cage + 0.03 - grid.abs_x, 0.03) * _inside(find_base(latents) + 0.12 - grid.y, 0.3)
    sag = 0.10 * lateral - 0.34 * lateral * lateral
    posterior = _rib_bands((grid.y - build.apex + sag) * spacing + build.rib_phase, 0.5)
    posterior *= _inside(grid.abs_x - 0.09, 0.05) * (0.7 + 0.6 * lateral * lateral)
    anterior = _rib_bands((grid.y - build.apex + 0.42 * grid.abs_x) * 0.8 * spacing + build.rib_phase, 0.3)
    anterior *= _inside(grid.abs_x - 0.34, 0.20)
    ribs = build.rib_contrast * chest * (posterior + 0.45 * anterior)
    course = build.apex + 0.19 - 0.16 * grid.abs_x + 0.03 * np.sin(grid.abs_x * 8.0)
    clavicle = _inside(0.030 - np.abs(grid.y - course), 0.025) * _inside(grid.abs_x - 0.07, 0.03)
    return vertebrae + ribs + 0.11 * clavicle * _inside(0.72 - grid.abs_x, 0.1)


def _rib_bands(phase: np.ndarray, duty: float) -> np.ndarray:
    """Return bands of unit height about every whole `phase`, brighter at the rims, where rays run along the cortex."""
    offset = np.abs(phase - np.round(phase)) * (2.0 / duty)
    return np.clip((1.0 - offset) * 4.0, 0.0, 1.0) * (0.55 + 0.45 * offset * offset)


def _breasts(latents: Latents, grid: Grid) -> np.ndarray:
    if latents.patient.breast == 0.0:
        return np.float32(0.0)
    radius = np.hypot(grid.abs_x - 0.27 * latents.patient.thoracic_width, (grid.y - 0.22) * 0.9)
    shape = np.sqrt(np.maximum(1.0 - np.square(radius / 0.30), 0.0))
    return latents.patient.breast * shape * _inside(grid.y - 0.15, 0.5)


def _devices(latents: Latents, grid: Grid) -> np.ndarray:
    """Return what lies on or in the patient whatever his heart: electrode, tube, opacity."""
    density = np.float32(0.0)
    if latents.electrode is not None:
        dx, dy = grid.x - latents.electrode.x, grid.y - latents.electrode.y
        wire = _inside(0.008 - np.abs(dx - latents.electrode.slope * dy), 0.012) * (dy > 0.0)
        density = density + 0.35 * _inside(0.035 - np.hypot(dx, dy), grid.edge) + 0.12 * wire
    if latents.tube is not None:
        course = latents.tube.offset + grid.y * (latents.tube.slope + latents.tube.bend * grid.y)
        density = density + 0.18 * bump(grid.x - course, 0.014) * (grid.y < latents.tube.end)
    if latents.opacity is not None:
        dx, dy = grid.x - latents.opacity.x, grid.y - latents.opacity.y
        density = density + 0.20 * bump(np.hypot(dx, dy), latents.opacity.radius)
    return density


def _mark_side(latents: Latents, density: np.ndarray) -> None:
    """Write the technician's lead letter into an upper corner, in place."""
    unit = max(1, density.shape[0] // 56)
    letter = np.kron(_LETTERS[latents.marker_side], np.ones((unit, unit), bool))
    left = 2 * unit if latents.marker_side < 0 else density.shape[1] - 5 * unit
    density[2 * unit : 7 * unit, left : left + 3 * unit][letter] = 1.3


def _gradient(latents: Latents, size: int) -> np.ndarray:
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    return latents.gradient[0] * ramp[None, :] + latents.gradient[1] * ramp[:, None]


def _expose(latents: Latents, rng: np.random.Generator, density: np.ndarray) -> np.ndarray:
    """Turn density into bytes of the latents' mean and standard deviation, uint8 [S, S]."""
    if latents.marker_side:
        _mark_side(latents, density)
    image = np.clip((density + 0.05) * (1.0 / 1.5), 0.0, 1.0) ** latents.gamma
    image += latents.noise_sd * rng.standard_normal(image.shape, dtype=np.float32)
    for _ in range(2):  # clipping moves both moments a little; the second round takes that back
        image = (image - image.mean()) * (latents.sd / image.std()) + latents.mean
        image = np.clip(image, 0.0, 1.0)
    return np.round(image * 255.0).astype(np.uint8)
