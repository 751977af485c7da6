"""NIH ChestX-ray14, cardiomegaly against no finding, as a TFDS builder over the download as it comes.

The folder given as config.data.manual_dir holds, at any depth, `Data_Entry_2017*.csv`, `BBox_List_2017.csv`,
`train_val_list.txt`, `test_list.txt` and the PNGs, of any size. Several folders may be given, separated by commas.
"""

import collections
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cxa_jax.console import progress_bar
from cxa_jax.data import images, nih_download, nih_metadata, records, splits
from cxa_jax.data.record_writer import RepeatableWriter, write_records
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

_SHAPING = ("image_size", "dev_split", "dev_fraction", "split_seed", "other_findings")
_SHARD_BYTES = 128 << 20  # of pixels; a shard's records are held in memory while it is written
_DESCRIPTION = """\
NIH ChestX-ray14 (112,120 frontal X-rays of 30,805 patients): images with Cardiomegaly (label 1) and those with exactly
'No Finding' (label 0; all others too if the name says so). Official patient-wise lists; dev is drawn from the training
list. Labels were mined from radiology reports, with an accuracy above 90 % by the authors' own estimate; a radiologist
drew boxes on test images only. Provider: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC
"""
_CITATION = """\
Wang, Peng, Lu, Lu, Bagheri, Summers: ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks on
Weakly-Supervised Classification and Localization of Common Thorax Diseases. CVPR 2017.
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class ChestXray14Config(tfds.core.BuilderConfig):
    """What shapes the stored bytes (and is in the name), and how to make them; the fields are config.data's."""

    image_size: int
    dev_split: str
    dev_fraction: float
    split_seed: int
    other_findings: bool
    allow_missing: bool
    num_workers: int
    manual_dir: str  # '' = the manual_dir of TFDS' own download config


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of each split, the file of each image, and where all of it came from."""

    rows: dict[str, list[nih_metadata.Row]]  # 'train', 'dev', 'test'; sorted by id
    paths: dict[str, pathlib.Path]
    provenance: dict[str, Any]


class ChestXray14(tfds.core.ShardBasedBuilder):
    """Writes the records of `records.record_features`, in the order of their ids.

    Written shard by shard: the writer that shuffles needs TensorFlow once a split outgrows a gigabyte.
    """

    name = "chestxray14"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded, so there are no checksums to look for
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Download ChestX-ray14 from {nih_download.URL} and unpack images_*.tar.gz."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=records.record_features(self.builder_config.image_size, with_heart=False),
            homepage=nih_download.URL,
            citation=_CITATION,
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list]:
        config = self.builder_config
        selection = select_images(config, config.manual_dir or str(dl_manager.manual_dir))
        self.info.metadata.update(selection.provenance)
        # One stream for all splits: TFDS writes the shards one after another, in the order given here.
        stream = self._convert([selection.paths[row.id] for rows in selection.rows.values() for row in rows])
        return {
            split: [functools.partial(self._make_examples, shard, stream) for shard in self._cut_shards(rows)]
            for split, rows in selection.rows.items()
        }

    def _example_writer(self) -> RepeatableWriter:
        return RepeatableWriter(self.info.file_format)

    def _convert(self, paths: list[pathlib.Path]) -> Iterator[images.GreyImage]:
        config = self.builder_config
        modes, sizes = collections.Counter(), collections.Counter()
        # Filled while the shards are written; TFDS saves the metadata after the last one.
        self.info.metadata.update(image_modes=modes, source_sizes=sizes)
        with progress_bar(len(paths), f"ChestX-ray14 at {config.image_size} px") as progress:
            for image in images.convert_images(paths, config.image_size, config.num_workers):
                modes[image.mode] += 1
                sizes[f"{image.width}x{image.height}"] += 1
                progress.update()
                yield image

    def _cut_shards(self, rows: list[nih_metadata.Row]) -> list[list[nih_metadata.Row]]:
        length = max(1, _SHARD_BYTES // self.builder_config.image_size**2)
        return [rows[start : start + length] for start in range(0, len(rows), length)]

    def _make_examples(
        self, rows: Sequence[nih_metadata.Row], stream: Iterator[images.GreyImage]
    ) -> Iterator[tuple[str, dict]]:
        scale = self.builder_config.image_size / nih_metadata.BOX_FRAME_PX
        # `rows` first: zip then stops before it takes an image of the next shard.
        for row, image in zip(rows, stream, strict=False):
            yield (
                row.id,
                {
                    "image": image.pixels[..., None],
                    "id": row.id,
                    "patient": row.patient,
                    "label": row.label,
                    "findings": row.findings,
                    "view": row.view,
                    "sex": row.sex,
                    "age": row.age,
                    "boxes": np.array(row.boxes, np.float32).reshape(-1, 4) * np.float32(scale),
                },
            )


def create_builder(data_config: ConfigDict) -> ChestXray14:
    """Return the builder of config.data; a prepared set is found by its name, without the download.

    The name holds what the user chose: size, dev split, its fraction and seed, whether other findings are in. What the
    set was made from is in its metadata (`load_provenance`), and `prepare` compares it.

    Raises:
      UserError: if image_size is not positive.
    """
    config = _create_config(data_config)
    return ChestXray14(config=config, data_dir=data_config.data_dir, file_format="array_record")


def prepare(data_config: ConfigDict) -> None:
    """Write the data set of config.data from the download, on all cores; a set that is already there is kept.

    Raises:
      UserError: if a part of the download is missing or damaged, or if the set that is already there was made from
        other files.
    """
    builder = create_builder(data_config)
    if builder.is_prepared():
        log.info("already prepared: %s", builder.data_path)
        _check_same_inputs(builder)
    else:
        nih_download.parse_folders(data_config.manual_dir)  # complain before TFDS makes its folders
        write_records(builder)
    provenance = load_provenance(builder)
    log.info("%s", describe_provenance(provenance))
    _warn_about_sizes(provenance["source_sizes"], data_config.image_size)


def find_prepared(data_config: ConfigDict) -> ChestXray14 | None:
    """Return the builder of config.data if its set is prepared, else None."""
    prepared = _create_config(data_config).name in list_prepared(data_config)
    return create_builder(data_config) if prepared else None


def list_prepared(data_config: ConfigDict) -> list[str]:
    """Return the names of all prepared ChestX-ray14 sets in config.data.data_dir: ['224px_image_dev0.1_seed0', ...]."""
    folder = pathlib.Path(data_config.data_dir).expanduser() / ChestXray14.name
    return sorted(path.parts[-3] for path in folder.glob(f"*/{ChestXray14.VERSION}/dataset_info.json"))


def load_provenance(builder: ChestXray14) -> dict[str, Any]:
    """Return what a prepared set was made from: inputs (names, hashes), counts, splits, shared patients, modes."""
    builder.info.metadata.load_metadata(builder.data_path)
    return dict(builder.info.metadata)


def describe_provenance(provenance: dict[str, Any]) -> str:
    """Return the provenance as lines to log."""
    inputs = provenance["inputs"]
    lines = [f"labels: {inputs['label_file']} ({provenance['label_version']}, SHA-256 {inputs['label_sha256'][:12]})"]
    lines += [f"{name}: {number:,}" for name, number in provenance["metadata_counts"].items()]
    lines += [f"these are the published counts: {'yes' if provenance['published_counts'] else 'NO'}"]
    lines += [f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in split.items())
              for name, split in provenance["splits"].items()]  # fmt: skip
    lines += [f"patients shared by {pair}: {number:,}" for pair, number in provenance["shared_patients"].items()]
    lines += [f"{what}: {provenance[what]:,}" for what in ("missing_images", "duplicate_images")]
    for what in ("image_modes", "source_sizes"):
        lines.append(f"{what}: " + ", ".join(f"{name} {number:,}" for name, number in provenance[what].items()))
    return "ChestX-ray14\n  " + "\n  ".join(lines)


def select_images(config: ChestXray14Config, manual_dir: str) -> Selection:
    """Choose the rows and files of every split from a download.

    Args:
      config: The builder's config.
      manual_dir: The download's folder or folders.

    Returns:
      The selection; its provenance holds the counts of the whole metadata, of each split, and of the shared patients.

    Raises:
      UserError: if a part of the download is missing or wrong, or a split would be empty.
    """
    folders = nih_download.parse_folders(manual_dir)
    download = nih_download.find_download(folders)
    metadata = nih_metadata.load_metadata(download, other_findings=config.other_findings)
    rows = [row for row in metadata.rows if row.id in download.images]
    missing = [row.id for row in metadata.rows if row.id not in download.images]
    _check_missing(missing, len(metadata.rows), manual_dir, config.allow_missing)
    chosen = _split(rows, config)
    shared = splits.count_shared_patients({name: [row.patient for row in part] for name, part in chosen.items()})
    if shared["train", "test"] or shared["dev", "test"]:
        raise UserError(f"training and test images share patients: {shared}; the lists are not the official ones")
    paths = {row.id: nih_download.choose_file(download.images[row.id]) for row in rows}
    provenance = {
        "inputs": nih_download.fingerprint(download, paths),
        "label_version": metadata.version,
        "metadata_counts": metadata.counts,
        "published_counts": metadata.has_published_counts,
        "splits": {name: _summarize(part) for name, part in chosen.items()},
        "shared_patients": {f"{a} and {b}": number for (a, b), number in shared.items()},
        "missing_images": len(missing),
        "duplicate_images": sum(len(download.images[row.id]) > 1 for row in rows),
    }
    return Selection(chosen, paths, provenance)


def _create_config(data_config: ConfigDict) -> ChestXray14Config:
    if data_config.image_size < 1:
        raise UserError(f"config.data.image_size={data_config.image_size}: must be at least 1 px")
    shaping = {name: data_config[name] for name in _SHAPING}
    name = "{image_size}px_{dev_split}_dev{dev_fraction:g}_seed{split_seed}".format(**shaping)
    name += "_other_findings" * data_config.other_findings
    making = {name: data_config[name] for name in ("allow_missing", "num_workers", "manual_dir")}
    return ChestXray14Config(name=name, **shaping, **making)


def _split(rows: list[nih_metadata.Row], config: ChestXray14Config) -> dict[str, list[nih_metadata.Row]]:
    official = [row for row in rows if row.part == "train_val"]
    dev = splits.draw_dev_split(
        [row.id for row in official],
        [row.label for row in official],
        [row.patient for row in official],
        by=config.dev_split,
        fraction=config.dev_fraction,
        seed=config.split_seed,
    )
    test = [row for row in rows if row.part == "test"]
    if not test:
        raise UserError("none of the images is on the test list: provide some of them")
    train = [row for row, is_dev in zip(official, dev, strict=True) if not is_dev]
    return {"train": train, "dev": [row for row, is_dev in zip(official, dev, strict=True) if is_dev], "test": test}


def _summarize(rows: list[nih_metadata.Row]) -> dict[str, int]:
    positives, patients = sum(row.label for row in rows), len({row.patient for row in rows})
    counts = {"images": len(rows), "positives": positives, "negatives": len(rows) - positives, "patients": patients}
    return counts | {"other_findings": sum(nih_metadata.label_of(row.findings) is None for row in rows)}


def _check_missing(missing: list[str], total: int, manual_dir: str, allow_missing: bool) -> None:
    if not missing:
        return
    message = f"{len(missing):,} of {total:,} images are missing below {manual_dir}: {nih_download.name_first(missing)}"
    if not allow_missing:
        raise UserError(f"{message}; fetch them, or set --config.data.allow_missing=True to prepare those there are")
    log.warning("%s", message)


def _check_same_inputs(builder: ChestXray14) -> None:
    config = builder.builder_config
    if not config.manual_dir:
        return
    stored = load_provenance(builder)["inputs"]
    given = select_images(config, config.manual_dir).provenance["inputs"]
    different = [f"{name} {stored[name]} there, {given[name]} here" for name in given if given[name] != stored[name]]
    if different:
        raise UserError(
            f"{builder.data_path} was made from other files: {'; '.join(different)}; "
            "choose another config.data.data_dir, or delete that folder"
        )


def _warn_about_sizes(source_sizes: dict[str, int], image_size: int) -> None:
    for name, number in source_sizes.items():
        width, height = map(int, name.split("x"))
        if width != height:
            log.warning("%d images of %s px are not square: squeezed to a square", number, name)
        if min(width, height) < image_size:
            log.warning("%d images of %s px were enlarged to %d px", number, name, image_size)
