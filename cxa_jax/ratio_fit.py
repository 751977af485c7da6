"""The reader of the cardiothoracic ratio, fitted on phantoms that are drawn for it, and its error on others."""

import logging
import time
from typing import Any

import numpy as np

from cxa_jax.agreement import describe_agreement
from cxa_jax.cardiothoracic import FRAME_PX, NUM_STEPS, RatioReader, compute_ratios, fit_ratio_reader, read_ratios
from cxa_jax.data.parallel import ordered_map
from cxa_jax.data.phantom import PhantomSpec
from cxa_jax.data.phantom_ratio import draw_measured

log = logging.getLogger(__name__)

FIT_SEED, HELD_OUT_SEED = 4_001, 4_002  # other patients; the presets' own phantoms have seed 0
NUM_FITTED = 1600  # half as drawn, half posed anew; 'natural', where ratios are one broad group
NUM_HELD_OUT = 200  # of each population below
HELD_OUT = {"natural": ("natural", False), "natural, posed as X-rays": ("natural", True), "hard": ("hard", False)}
PREVALENCE = 0.3  # of hard; natural knows none
NUM_RESAMPLES = 1000


def draw_chests(
    preset: str, seed: int, patients: range, posed: bool, num_workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one phantom of each patient: images uint8 [N, FRAME_PX, FRAME_PX, 1], and their EDGES [N, 6].

    Args:
        preset: of the phantoms.
        seed: of the population.
        patients: their numbers.
        posed: whether they are posed anew, as X-rays are.
        num_workers: processes that draw; 0 = one for each core. The drawings do not depend on it.
    """
    spec = PhantomSpec(preset, PREVALENCE, 0.0, seed)
    tasks = [(spec, FRAME_PX, patient, posed) for patient in patients]
    drawn = list(ordered_map(draw_measured, tasks, num_workers))
    return np.stack([image for image, _ in drawn])[..., None], np.stack([edges for _, edges in drawn])


def fit_on_phantoms(num_workers: int, num_fitted: int = NUM_FITTED, num_held_out: int = NUM_HELD_OUT) -> RatioReader:
    """Draw phantoms, fit the reader, and measure it on other patients; the same numbers at every call.

    Returns:
        The reader; its facts have what it was fitted on, and `error`: for each of HELD_OUT what `measure_error` says.
    """
    log.info("fitting the reader of the cardiothoracic ratio on %d drawings: some 20 s on two cores", num_fitted)
    began, half = time.monotonic(), num_fitted // 2
    parts = [
        draw_chests("natural", FIT_SEED, patients, posed, num_workers)
        for patients, posed in ((range(half), False), (range(half, num_fitted), True))
    ]
    images, edges = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.random.default_rng(FIT_SEED).permutation(num_fitted)  # folds have both kinds
    reader = fit_ratio_reader(images[order], edges[order])
    error = {
        name: measure_error(reader, *draw_chests(preset, HELD_OUT_SEED, range(num_held_out), posed, num_workers))
        for name, (preset, posed) in HELD_OUT.items()
    }
    reader.facts.update(
        num_phantoms=num_fitted,
        frame_px=FRAME_PX,
        num_steps=NUM_STEPS,
        seeds={"fit": FIT_SEED, "held_out": HELD_OUT_SEED},
        error=error,
    )
    log.info("drawn, fitted and held to other drawings in %.1f s", time.monotonic() - began)
    return reader


def measure_error(reader: RatioReader, images: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Return the agreement of ratio, heart width and thorax width with the masks'; widths as shares of the image's.

    Args:
        reader: fitted on other phantoms.
        images: uint8 [N, H, W, 1], one of each patient.
        edges: [N, 6], measured on their masks.
    """
    ratios, found = read_ratios(reader, images)
    options = {"num_resamples": NUM_RESAMPLES, "seed": HELD_OUT_SEED}
    pairs = {
        "ratio": (ratios, compute_ratios(edges)),
        "heart_width": (found[:, 5] - found[:, 4], edges[:, 5] - edges[:, 4]),
        "thorax_width": (found[:, 1] - found[:, 0], edges[:, 1] - edges[:, 0]),
    }
    return {name: describe_agreement(a, b, None, **options) for name, (a, b) in pairs.items()}
