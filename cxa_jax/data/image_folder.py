"""One's own labelled images, from folders or a CSV, as a TFDS builder: prepared like the others."""

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.console import progress_bar
from cxa_jax.data import images, records, splits
from cxa_jax.data.folder_table import Row, read_rows
from cxa_jax.data.near_duplicates import Pair
from cxa_jax.data.record_writer import RepeatableWriter, write_records
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

LEAKAGE_FILE = "leakage.csv"
_SHARD_BYTES = 128 << 20  # of pixels
_DESCRIPTION = "A user's own images with labels, positive (1) against negative (0)."


@dataclasses.dataclass(eq=False, kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """The fields of config.data that shape or make the set."""

    data: ConfigDict


class ImageFolder(tfds.core.ShardBasedBuilder):
    """Writes the records of `records.record_features`, each split in the order of its ids."""

    name = "image_folder"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = records.record_features(self.builder_config.data.image_size, with_heart=False)
        return tfds.core.DatasetInfo(
            builder=self, description=_DESCRIPTION, features=features, metadata=tfds.core.MetadataDict()
        )

    def _example_writer(self) -> RepeatableWriter:
        return RepeatableWriter(self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list]:
        del dl_manager  # nothing is downloaded
        parts = assign_splits(_read(self.builder_config.data), self.builder_config.data)
        self.info.metadata.update(_describe(parts))
        stream = self._convert([row.path for rows in parts.values() for row in rows])
        length = max(1, _SHARD_BYTES // self.builder_config.data.image_size**2)
        return {
            split: [
                functools.partial(self._make_examples, rows[start : start + length], stream)
                for start in range(0, len(rows), length)
            ]
            for split, rows in parts.items()
        }

    def _convert(self, paths: list[pathlib.Path]) -> Iterator[images.GreyImage]:
        data, seen = self.builder_config.data, collections.Counter()
        self.info.metadata["notes"] = seen  # filled while the shards are written; saved after the last one
        with progress_bar(len(paths), f"images at {data.image_size} px") as progress:
            for image in images.convert_images(paths, data.image_size, data.num_workers):
                seen.update([image.mode, f"{image.width}x{image.height}", *image.notes])
                progress.update()
                yield image

    def _make_examples(self, rows: Sequence[Row], stream: Iterator[images.GreyImage]) -> Iterator[tuple[str, dict]]:
        for row, image in zip(rows, stream, strict=False):  # rows first: zip must not take the next shard's image
            scale = np.array([image.pixels.shape[1] / image.width, image.pixels.shape[0] / image.height] * 2)
            boxes = np.array(row.boxes, np.float64).reshape(-1, 4)
            if len(boxes) and (boxes[:, :2] + boxes[:, 2:] > (image.width + 1, image.height + 1)).any():
                raise UserError(f"{row.id}: a box leaves its image of {image.width} x {image.height} px")
            record = {"image": image.pixels[..., None], "boxes": (boxes * scale).astype(np.float32)}
            record |= {name: getattr(row, name) for name in ("id", "patient", "label", "view", "sex", "age")}
            yield row.id, record | {"findings": "Cardiomegaly" if row.label else "No Finding"}


def prepare(data_config: ConfigDict) -> None:
    """Write the set of config.data; a set that is already there is kept if the files are still the same.

    Raises:
      UserError: the folder or table cannot be understood, a file cannot be read, or the files changed since.
    """
    builder = create_builder(data_config)
    if builder.is_prepared():
        log.info("already prepared: %s", builder.data_path)
        stored, given = load_provenance(builder), _describe(assign_splits(_read(data_config), data_config))
        if stored["files"] != given["files"]:
            raise UserError(f"{builder.data_path} was made from other files or labels; delete that folder")
    else:
        assign_splits(_read(data_config), data_config)  # complain before TFDS makes its folders
        write_records(builder)
    provenance = load_provenance(builder)
    lines = [f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in split.items())
             for name, split in provenance["splits"].items()]  # fmt: skip
    lines += [f"files: {', '.join(f'{what} {number:,}' for what, number in provenance['notes'].items())}"]
    log.info("%s\n  %s", builder.data_path, "\n  ".join(lines))
    for pair, number in provenance["shared_patients"].items():
        if number:
            log.warning("%s share %d patients: what is measured on one says little of new patients", pair, number)


def create_builder(data_config: ConfigDict) -> ImageFolder:
    """Return the builder of config.data; its name holds a digest of all fields that choose and shape the set."""
    config = ImageFolderConfig(name=_name(data_config), data=data_config)
    return ImageFolder(config=config, data_dir=data_config.data_dir, file_format="array_record")


def find_prepared(data_config: ConfigDict) -> ImageFolder | None:
    """Return the builder of config.data if its set is prepared, else None; the images themselves are not needed."""
    folder = pathlib.Path(data_config.data_dir).expanduser() / ImageFolder.name / _name(data_config)
    prepared = (folder / str(ImageFolder.VERSION) / "dataset_info.json").is_file()
    return create_builder(data_config) if prepared else None


def load_provenance(builder: ImageFolder) -> dict[str, Any]:
    """Return what a prepared set was made from: digest of files and labels, counts, shared patients, file kinds."""
    builder.info.metadata.load_metadata(builder.data_path)
    return dict(builder.info.metadata)


def report_leakage(folder: pathlib.Path, pairs: Sequence[Pair]) -> None:
    """Write the pairs of images that stand in two splits to `folder`/leakage.csv, and log how many there are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Pair._fields, *pairs])
    with replace_when_written(folder / LEAKAGE_FILE) as neighbour:
        neighbour.write_text(text.getvalue(), encoding="utf-8")
    if not pairs:
        log.info("no image stands in two splits, identical or nearly so (%s)", folder / LEAKAGE_FILE)
        return
    counts = collections.Counter((pair.split_a, pair.split_b, pair.identical) for pair in pairs)
    found = ", ".join(
        f"{a}/{b} {number} {'identical' if same else 'near-identical'}" for (a, b, same), number in counts.items()
    )
    log.warning("LEAKAGE: the same picture in two splits: %s; see %s", found, folder / LEAKAGE_FILE)


def assign_splits(rows: list[Row], data_config: ConfigDict) -> dict[str, list[Row]]:
    """Distribute the rows to train, dev and test.

    Splits that the user named are kept; a missing dev split is drawn from train, and without any splits test is drawn
    first: by patient always, with the shares config.data.folder.test_fraction and config.data.dev_fraction.

    Raises:
      UserError: some rows name a split and others do not, train or test is missing, or a split lacks a class.
    """
    named = {row.split for row in rows}
    if "" in named and len(named) > 1:
        raise UserError(f"some images name their split ({', '.join(sorted(named - {''}))}) and others do not")
    if named == {""}:
        rest, test = _draw(
            rows, data_config.folder.test_fraction, data_config.split_seed, "test", "folder.test_fraction"
        )
    elif {"train", "test"} <= named:
        rest, test = ([row for row in rows if row.split == "train"], [row for row in rows if row.split == "test"])
    else:
        raise UserError(
            f"the images name the splits {', '.join(sorted(named))}: train and test are needed, or none at all"
        )
    dev = [row for row in rows if row.split == "dev"]
    if not dev:
        rest, dev = _draw(rest, data_config.dev_fraction, data_config.split_seed, "dev", "dev_fraction")
    parts = {"train": rest, "dev": dev, "test": test}
    for name, part in parts.items():
        if len({row.label for row in part}) < 2:
            raise UserError(f"the {name} split has {len(part)} images of one class; both are needed")
    return parts


def _draw(rows: list[Row], fraction: float, seed: int, name: str, field: str) -> tuple[list[Row], list[Row]]:
    columns = [row.id for row in rows], [row.label for row in rows], [row.patient for row in rows]
    try:
        drawn = splits.draw_dev_split(*columns, by="patient", fraction=fraction, seed=seed)
    except UserError as error:
        raise UserError(f"cannot draw the {name} split by config.data.{field}={fraction}: {error}") from error
    chosen = list(zip(rows, drawn, strict=True))
    return [row for row, is_drawn in chosen if not is_drawn], [row for row, is_drawn in chosen if is_drawn]


def _read(data_config: ConfigDict) -> list[Row]:
    if not data_config.manual_dir:
        raise UserError("config.data.manual_dir is empty; config.data.name=image_folder needs the folder of the images")
    rows = read_rows(pathlib.Path(data_config.manual_dir).expanduser(), data_config.folder)
    for row in rows:
        if not row.id.isprintable():  # bytes that are no text, or a line's end
            raise UserError(f"{row.id!r} below config.data.manual_dir has letters that cannot be printed; rename it")
    return rows


def _describe(parts: dict[str, list[Row]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, rows in parts.items():
        for row in rows:
            facts = [
                name,
                row.id,
                row.patient,
                row.label,
                row.boxes,
                row.view,
                row.sex,
                row.age,
                row.path.stat().st_size,
            ]
            digest.update(json.dumps(facts).encode())
    shared = splits.count_shared_patients({name: [row.patient for row in rows] for name, rows in parts.items()})
    return {
        "files": digest.hexdigest(),
        "splits": {name: _count(rows) for name, rows in parts.items()},
        "shared_patients": {f"{a} and {b}": number for (a, b), number in shared.items()},
    }


def _count(rows: list[Row]) -> dict[str, int]:
    patients = len({row.patient for row in rows})
    return {"images": len(rows), "positives": sum(row.label for row in rows), "patients": patients}


def _name(data_config: ConfigDict) -> str:
    if data_config.image_size < 1:
        raise UserError(f"config.data.image_size={data_config.image_size}: must be at least 1 px")
    root = pathlib.Path(data_config.manual_dir).expanduser().absolute()
    shaping = {name: data_config[name] for name in ("image_size", "dev_fraction", "split_seed")}
    shaping |= {"manual_dir": str(root), "folder": data_config.folder.to_dict()}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', root.name)}_{data_config.image_size}px_{digest}"
