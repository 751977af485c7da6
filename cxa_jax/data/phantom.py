"""Latents of the chest phantom: every number that a drawing depends on, sampled without drawing.

Lengths are in half image sides: the image spans [-1, 1] x [-1, 1], x to the right (the patient's left), y down.
Every draw has its own random stream, keyed by (seed, stream, patient, image), so any image can be sampled alone and
in any order. The heart has streams of its own: nothing else in the drawing can depend on the label.
"""

import enum
from dataclasses import dataclass

import numpy as np

CTR_THRESHOLD = 0.5  # cardiomegaly is a cardiothoracic ratio above it
MAX_IMAGES = 4  # of one patient


@dataclass(frozen=True)
class Preset:
    """Ranges that set how hard it is to see the ratio of two widths (section 6 of the paper's specification)."""

    thoracic_width: tuple[float, float]  # T, uniform, half image sides
    magnification: tuple[float, float]  # uniform
    shift_sd: float  # of the patient in the frame, half image sides
    rotation_sd_deg: float
    bimodal: bool  # True: two groups of CTR, `prevalence` of the patients in the upper one; False: one broad group


PRESETS = {
    "easy": Preset((1.30, 1.74), (0.94, 1.06), 0.05, 2.5, bimodal=True),
    "hard": Preset((1.15, 1.70), (0.80, 1.12), 0.09, 5.0, bimodal=True),
    "natural": Preset((1.15, 1.70), (0.80, 1.12), 0.09, 5.0, bimodal=False),
}


@dataclass(frozen=True)
class PhantomSpec:
    """What a population of phantoms is drawn from.

    Attributes:
        preset: key of PRESETS.
        prevalence: probability that a patient's CTR is from the upper group, (0, 1); without effect in 'natural'.
        label_noise: probability that an image's label is flipped, [0, 0.5).
        seed: root of every draw, >= 0.
    """

    preset: str
    prevalence: float
    label_noise: float
    seed: int


@dataclass(frozen=True)
class Patient:
    """The build of one patient; none of it depends on the heart, and all but `ctr` is independent of the label."""

    ctr: float  # cardiothoracic ratio, mean over the patient's images
    thoracic_width: float  # T
    sex: str  # 'F' | 'M'
    age: int  # years
    apex: float  # y of the top of the lungs
    base: float  # y of the costophrenic angles at rest
    cage_roundness: float  # exponent of the rib cage's outline
    chest_wall: float  # thickness of the tissue outside the cage
    dome_height: float  # of the diaphragm above the costophrenic angles
    dome_difference: float  # how much higher the right dome stands
    heart_aspect: float  # minor over major axis
    heart_angle: float  # of the major axis below the horizontal, rad
    heart_left_share: float  # share of the heart's width left of the midline
    heart_depth: float  # how far the heart reaches below the costophrenic angles
    num_ribs: int
    rib_phase: float
    rib_contrast: float
    breast: float  # thickness of the breast shadows
    stomach_bubble: float  # amount of air under the left dome


@dataclass(frozen=True)
class Electrode:
    """A round electrode on the skin and its wire."""

    x: float
    y: float
    slope: float


@dataclass(frozen=True)
class Tube:
    """A bent line or tube, x = offset + slope y + bend y^2, ending at `end`."""

    offset: float
    slope: float
    bend: float
    end: float


@dataclass(frozen=True)
class Opacity:
    """A soft round shadow in a lung."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Latents:
    """One image: the patient, how he stood, what lay on him, and how the film was exposed."""

    patient: Patient
    ctr: float  # of this image
    label: int  # ctr > 0.5, flipped with the probability `label_noise`
    view: str  # 'AP' for the upper half of the magnifications (the heart is further from the film) | 'PA'
    shift: tuple[float, float]
    rotation: float  # rad
    magnification: float
    inspiration: float  # added to the height of the diaphragm
    aeration: float  # how dark the lungs are
    electrode: Electrode | None
    tube: Tube | None
    opacity: Opacity | None
    marker_side: int  # -1 left edge, 1 right edge, 0 none
    gradient: tuple[float, float]  # uneven exposure, along x and y
    gamma: float
    mean: float  # the finished image's mean, of [0, 1]
    sd: float  # the finished image's standard deviation
    noise_sd: float
    sharpness_px: float  # width of an edge at 224 px
    texture_key: tuple[int, ...]  # seeds the lung texture and the film's grain


class Stream(enum.IntEnum):
    """What a random stream is for; a new purpose takes a new number, so that the others keep their draws."""

    PATIENT_HEART = 1
    PATIENT_BUILD = 2
    NUM_IMAGES = 3
    IMAGE_HEART = 4
    IMAGE_LABEL = 5
    IMAGE_POSE = 6
    IMAGE_TEXTURE = 7
    SPLIT = 8  # of the whole population


def stream_rng(*key: int) -> np.random.Generator:
    """Return the generator of one key: seed, stream, and the patient and image it belongs to."""
    return np.random.default_rng(key)


def _clipped_normal(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    return float(np.clip(rng.normal(mean, sd), low, high))


def num_images(spec: PhantomSpec, patient: int) -> int:
    """Return how many images the patient has, 1 to 4, whatever the heart."""
    return int(stream_rng(spec.seed, Stream.NUM_IMAGES, patient).integers(1, MAX_IMAGES + 1))


def _sample_ctr(spec: PhantomSpec, patient: int) -> float:
    rng = stream_rng(spec.seed, Stream.PATIENT_HEART, patient)
    if not PRESETS[spec.preset].bimodal:
        return _clipped_normal(rng, 0.47, 0.06, 0.33, 0.66)
    if rng.random() < spec.prevalence:
        return _clipped_normal(rng, 0.565, 0.035, 0.505, 0.66)
    return _clipped_normal(rng, 0.435, 0.035, 0.33, 0.495)


def _sample_image_ctr(spec: PhantomSpec, patient_ctr: float, patient: int, image: int) -> float:
    return patient_ctr + stream_rng(spec.seed, Stream.IMAGE_HEART, patient, image).normal(0.0, 0.006)


def _sample_label(spec: PhantomSpec, ctr: float, patient: int, image: int) -> int:
    flipped = stream_rng(spec.seed, Stream.IMAGE_LABEL, patient, image).random() < spec.label_noise
    return int((ctr > CTR_THRESHOLD) != flipped)


def has_positive_image(spec: PhantomSpec, patient: int) -> bool:
    """Return whether any of the patient's images is labelled 1."""
    patient_ctr = _sample_ctr(spec, patient)
    images = range(num_images(spec, patient))
    return any(_sample_label(spec, _sample_image_ctr(spec, patient_ctr, patient, i), patient, i) for i in images)


def sample_patient(spec: PhantomSpec, patient: int) -> Patient:
    """Sample the patient's build.

    Args:
        spec: the population.
        patient: number of the patient, >= 0.
    """
    rng = stream_rng(spec.seed, Stream.PATIENT_BUILD, patient)
    sex = "F" if rng.random() < 0.45 else "M"
    breast = rng.uniform(0.0, 0.16)
    return Patient(
        ctr=_sample_ctr(spec, patient),
        thoracic_width=rng.uniform(*PRESETS[spec.preset].thoracic_width),
        sex=sex,
        age=int(rng.integers(20, 91)),
        apex=rng.uniform(-0.84, -0.72),
        base=rng.uniform(0.42, 0.60),
        cage_roundness=rng.uniform(0.44, 0.62),
        chest_wall=rng.uniform(0.08, 0.20),
        dome_height=rng.uniform(0.08, 0.20),
        dome_difference=rng.uniform(0.02, 0.06),
        heart_aspect=rng.uniform(0.64, 0.86),
        heart_angle=rng.uniform(0.30, 0.75),
        heart_left_share=rng.uniform(0.60, 0.72),
        heart_depth=rng.uniform(-0.06, 0.04),
        num_ribs=int(rng.integers(9, 12)),
        rib_phase=rng.random(),
        rib_contrast=rng.uniform(0.06, 0.16),
        breast=breast if sex == "F" else 0.0,
        stomach_bubble=max(0.0, rng.uniform(-0.25, 0.30)),
    )


def _sample_electrode(rng: np.random.Generator) -> Electrode:
    return Electrode(x=rng.uniform(-0.6, 0.6), y=rng.uniform(-0.5, 0.5), slope=rng.uniform(-0.5, 0.5))


def _sample_tube(rng: np.random.Generator) -> Tube:
    offset, slope, bend = rng.uniform(-0.2, 0.2), rng.uniform(-0.3, 0.3), rng.uniform(-0.4, 0.4)
    return Tube(offset, slope, bend, end=rng.uniform(0.0, 0.4))


def _sample_opacity(rng: np.random.Generator) -> Opacity:
    side = 1.0 if rng.random() < 0.5 else -1.0
    return Opacity(side * rng.uniform(0.28, 0.55), rng.uniform(-0.45, 0.25), rng.uniform(0.04, 0.13))


def sample_image(spec: PhantomSpec, patient: int, image: int) -> Latents:
    """Sample all that one drawing depends on.

    Args:
        spec: the population.
        patient: number of the patient, >= 0.
        image: number of the image within the patient, 0 to `num_images` - 1.
    """
    preset = PRESETS[spec.preset]
    build = sample_patient(spec, patient)
    ctr = _sample_image_ctr(spec, build.ctr, patient, image)
    rng = stream_rng(spec.seed, Stream.IMAGE_POSE, patient, image)
    limit = 2.0 * preset.shift_sd  # keeps the heart within the frame
    magnification = rng.uniform(*preset.magnification)
    return Latents(
        patient=build,
        ctr=ctr,
        label=_sample_label(spec, ctr, patient, image),
        view="AP" if magnification > sum(preset.magnification) / 2 else "PA",
        shift=tuple(_clipped_normal(rng, 0.0, preset.shift_sd, -limit, limit) for _ in range(2)),
        rotation=float(np.deg2rad(rng.normal(0.0, preset.rotation_sd_deg))),
        magnification=magnification,
        inspiration=rng.normal(0.0, 0.04),
        aeration=rng.uniform(0.52, 0.80),
        electrode=_sample_electrode(rng) if rng.random() < 0.35 else None,
        tube=_sample_tube(rng) if rng.random() < 0.35 else None,
        opacity=_sample_opacity(rng) if rng.random() < 0.2 else None,
        marker_side=int(rng.choice((-1, 0, 1))),
        gradient=(rng.normal(0.0, 0.08), rng.normal(0.0, 0.08)),
        gamma=rng.uniform(0.65, 1.5),
        mean=rng.uniform(0.40, 0.60),
        sd=rng.uniform(0.16, 0.24),
        noise_sd=rng.uniform(0.005, 0.03),
        sharpness_px=rng.uniform(1.0, 2.5),
        texture_key=(spec.seed, int(Stream.IMAGE_TEXTURE), patient, image),
    )
