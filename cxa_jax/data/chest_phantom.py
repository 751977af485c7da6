"""The chest phantom as a TFDS builder: drawn on all cores, stored as ArrayRecord, found again by its name."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cxa_jax.console import progress_bar
from cxa_jax.data import parallel, phantom, phantom_boxes, phantom_render, phantom_splits, records
from cxa_jax.data.phantom import PhantomSpec
from cxa_jax.data.record_writer import RepeatableWriter, write_records
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

_SHARD_BYTES = 128 << 20  # of images and masks
_DESCRIPTION = """\
Procedural frontal chest X-rays with a heart of known width: drawings, not images of patients. Label 1 = cardiothoracic
ratio above 0.5. Mean and contrast of the images know nothing of the label.
"""

Key = tuple[int, int]  # patient, image


@dataclasses.dataclass(eq=False, kw_only=True)
class ChestPhantomConfig(tfds.core.BuilderConfig):
    """What shapes the stored bytes (and is in the name), and the number of processes that draw."""

    spec: PhantomSpec
    box: str
    num_patients: int
    image_size: int
    num_workers: int


class ChestPhantom(tfds.core.ShardBasedBuilder):
    """Procedural chest X-rays, drawn from a seed by `cxa_jax.data.phantom` and `phantom_render`; nothing is downloaded.

    Source: no patient stands behind them. Each drawing adds up tissue, bone and heart and takes away air; the heart is
    a rotated ellipse whose width is the cardiothoracic ratio (CTR) times the thoracic width T.
    Label: CTR > 0.5, exact, unless `label_noise` flips it. The heart's mask and the box are never wrong.
    Presets: 'easy' (T 1.30-1.74 half image sides, magnification .94-1.06) and 'hard' (T 1.15-1.70, magnification
    .80-1.12, more shift and rotation), both with two groups of CTR about .435 and .565; 'natural' ('hard', but
    CTR ~ N(.47, .06), about 31 % positive).
    Shortcuts: T, magnification, pose, devices, sex, age, view, number of images, and each image's mean and standard
    deviation are drawn without the label; its 16-bin histogram predicts the label with an AUROC of at most .53. The
    8x8 thumbnail shows the heart: .99 (easy), .96 (hard), .90 (natural); the heart's width alone: .95, .86, .80.
    Splits: 70 % of the patients train, 15 % dev, 15 % test; 1 to 4 images each; no patient is in two; in the order of
    the ids.
    Fields: those of `records.record_features`: image uint8 [S, S, 1], S of 32 to 1024; id 'p000123_2'; patient
    'p000123'; label 0 or 1; findings 'Cardiomegaly' or 'No Finding'; view 'PA' or 'AP'; sex 'F' or 'M'; age 20 to 90;
    boxes float32 [1, 4], x, y, w, h in px; heart_mask uint8 [S, S, 1], 0 or 1; ctr .31 to .68.
    Boxes: about the heart's mask, exactly ('mask'), or about heart and pulmonary trunk, the cardiac silhouette that
    radiologists box ('radiologist'; `cxa_jax.data.phantom_boxes` says why). All else is the same with both.
    """

    name = "chest_phantom"
    VERSION = tfds.core.Version("1.0.0")  # raise it whenever the same seed gives other bytes
    url_infos = None  # nothing is downloaded, so there are no checksums to look for

    def _info(self) -> tfds.core.DatasetInfo:
        features = records.record_features(self.builder_config.image_size, with_heart=True)
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features)

    def _example_writer(self) -> RepeatableWriter:
        return RepeatableWriter(file_format=self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list]:
        config = self.builder_config
        patients = phantom_splits.assign_splits(config.spec, config.num_patients)
        keys = {split: _list_keys(config.spec, numbers) for split, numbers in patients.items()}
        # One stream for all splits: TFDS writes the shards one after another, in the order given here.
        stream = _draw_all(config, list(itertools.chain.from_iterable(keys.values())))
        length = max(1, _SHARD_BYTES // (2 * config.image_size**2))
        return {
            split: [
                functools.partial(_make_examples, split_keys[start : start + length], stream)
                for start in range(0, len(split_keys), length)
            ]
            for split, split_keys in keys.items()
        }


def create_builder(data_config: ConfigDict) -> ChestPhantom:
    """Return the builder of config.data; its name holds all that shapes the bytes, so a prepared set is found by it.

    Args:
        data_config: config.data; image_size, data_dir, num_workers and phantom are read.

    Raises:
        UserError: if a parameter is out of its range; names the field.
    """
    _check(data_config)
    values = data_config.phantom
    spec = PhantomSpec(values.preset, values.prevalence, values.label_noise, values.seed)
    # 'natural' draws the same hearts whatever the prevalence.
    group = f"_prevalence{spec.prevalence!r}" if phantom.PRESETS[spec.preset].bimodal else ""
    size, patients = data_config.image_size, values.num_patients
    boxes = "" if values.box == "mask" else f"_{values.box}_boxes"  # older sets have the mask's, and no word of it
    config = ChestPhantomConfig(
        name=f"{spec.preset}_{size}px_{patients}patients{group}_noise{spec.label_noise!r}_seed{spec.seed}{boxes}",
        spec=spec,
        box=values.box,
        num_patients=patients,
        image_size=size,
        num_workers=data_config.num_workers,
    )
    return ChestPhantom(config=config, data_dir=data_config.data_dir, file_format="array_record")


def prepare(data_config: ConfigDict) -> None:
    """Draw the phantoms of config.data on `num_workers` processes (0 = all cores); a set that is there is kept.

    Raises:
        UserError: if a parameter is out of its range, or too few patients are of one class to fill the splits.
    """
    builder = create_builder(data_config)
    if builder.is_prepared():
        log.info("already prepared: %s", builder.data_path)
        return
    config = builder.builder_config
    phantom_splits.assign_splits(config.spec, config.num_patients)  # complains before TFDS makes its folders
    write_records(builder)


def _check(data_config: ConfigDict) -> None:
    values = data_config.phantom
    if values.preset not in phantom.PRESETS:
        _refuse("phantom.preset", values.preset, f"choose one of {', '.join(phantom.PRESETS)}")
    if values.box not in phantom_boxes.BOXES:
        _refuse("phantom.box", values.box, f"choose one of {', '.join(phantom_boxes.BOXES)}")
    if not 32 <= data_config.image_size <= 1024:
        _refuse("image_size", data_config.image_size, "phantoms are drawn from 32 to 1024 px")
    if not 0.0 < values.prevalence < 1.0:
        _refuse("phantom.prevalence", values.prevalence, "must be above 0 and below 1")
    if not 0.0 <= values.label_noise < 0.5:
        _refuse("phantom.label_noise", values.label_noise, "must be at least 0 and below 0.5")
    if values.num_patients < 20:
        _refuse("phantom.num_patients", values.num_patients, "at least 20 are needed to fill three splits")
    if values.seed < 0:
        _refuse("phantom.seed", values.seed, "must be at least 0")
    if data_config.num_workers < 0:
        _refuse("num_workers", data_config.num_workers, "must be at least 0 (0 = one for each core)")


def _refuse(field: str, value: object, cure: str) -> None:
    raise UserError(f"config.data.{field}={value!r}: {cure}")


def _list_keys(spec: PhantomSpec, patients: list[int]) -> list[Key]:
    return [(patient, image) for patient in patients for image in range(phantom.num_images(spec, patient))]


def _draw_all(config: ChestPhantomConfig, keys: list[Key]) -> Iterator[phantom_render.Drawing]:
    draw = functools.partial(phantom_render.draw, config.spec, config.image_size, box=config.box)
    with progress_bar(len(keys), f"draw phantoms at {config.image_size} px") as progress:
        for drawing in parallel.ordered_map(draw, keys, config.num_workers):
            progress.update()
            yield drawing


def _make_examples(keys: list[Key], stream: Iterator[phantom_render.Drawing]) -> Iterator[tuple[str, dict]]:
    # `keys` first: zip then stops before it takes a drawing of the next shard.
    for (patient, image), drawing in zip(keys, stream, strict=False):
        latents = drawing.latents
        image_id = f"phantom{patient:06d}_{image}"
        record = {
            "image": drawing.image[..., None],
            "id": image_id,
            "patient": f"phantom{patient:06d}",
            "label": latents.label,
            "findings": "Cardiomegaly" if latents.label else "No Finding",
            "view": latents.view,
            "sex": latents.patient.sex,
            "age": latents.patient.age,
            "boxes": np.array([drawing.box], np.float32),
            "heart_mask": drawing.heart_mask[..., None],
            "ctr": latents.ctr,
        }
        yield image_id, record
