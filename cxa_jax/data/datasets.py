"""Prepared data as splits: random access to the images, and an index of everything else.

The index (labels, patients, views ... of all records, and a fingerprint of the pixels) is computed in one pass over
the prepared records and kept as one file beside them.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from ml_collections import ConfigDict

from cxa_jax.atomic_files import replace_when_written
from cxa_jax.console import progress_bar
from cxa_jax.data import chest_phantom, chestxray14, image_folder
from cxa_jax.data.damage import describe_damage, naming_damage
from cxa_jax.data.nih_description import describe_lack, describe_nih
from cxa_jax.data.records import decode, decode_image
from cxa_jax.data.views import SelectedRows, describe_views, select_views
from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

TITLES = {
    "chestxray14": "NIH ChestX-ray14",
    "chest_phantom": "chest phantom (drawings, not X-rays of patients)",
    "image_folder": "images of one's own",
}
SPLITS = ("train", "dev", "test")
INDEX_FIELDS = ("id", "patient", "label", "view", "sex", "age", "findings")
INDEX_FILE = "index.npz"
# What numpy and the file system raise for an index that is cut or altered.
_DAMAGE = (ValueError, LookupError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
PHANTOM = "Chest phantoms: procedural drawings, not X-rays of patients"


class RecordSource:
    """Random access to the decoded records of one TFDS split."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """Open the split; nothing is read yet."""
        self._records = builder.as_data_source(split)
        self._image_shape = builder.info.features["image"].shape
        self._folder = pathlib.Path(builder.data_path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self._naming_damage():
            return decode(self._records[row])

    def read_image(self, row: int) -> np.ndarray:
        """Return the image of a row, uint8 [S, S, 1], read-only, in a sixth of the time of the whole record."""
        with self._naming_damage():
            return decode_image(self._records.data_source[row], self._image_shape)

    @contextlib.contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, DecodeError) as error:  # of array_record, TFDS, protobuf: altered bytes
            raise describe_damage(self._folder, str(error)) from error


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: `source[i]` is the decoded record of row i, `index[field][i]` what is known of it besides the image.

    Attributes:
      name: 'train' | 'dev' | 'test'.
      source: random access, len() and [row] -> record as of `records.decode`.
      index: arrays [N] for each of INDEX_FIELDS, in the order of the source; label and age int32, the others text.
    """

    name: str
    source: Sequence[dict[str, Any]]
    index: dict[str, np.ndarray]

    def read_image(self, row: int) -> np.ndarray:
        """Return the image of a row, uint8 [S, S, 1], without the rest of its record where the source can do that."""
        fast = isinstance(self.source, RecordSource | SelectedRows)
        return self.source.read_image(row) if fast else self.source[row]["image"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of one prepared data set.

    Attributes:
      name: one of TITLES.
      image_size: side of the stored images in px.
      splits: Split for each of 'train', 'dev', 'test'.
      fingerprint: sha256 over splits, ids, patients, labels and pixels, in row order: equal means the same data.
      description: one sentence for logs and reports: what the images are, and where they lie.
      views: config.data.views, '' if images of all views are in.
    """

    name: str
    image_size: int
    splits: dict[str, Split]
    fingerprint: str
    description: str
    views: str = ""

    @property
    def title(self) -> str:
        """What the images are, for the heading of a picture or table."""
        return make_title(self.name, self.views)

    @property
    def is_phantom(self) -> bool:
        """True if the images are drawn, not X-rays of patients."""
        return self.name == "chest_phantom"


def make_title(name: str, views: str) -> str:
    """Return what the images of a data set are, and which views alone if not all."""
    return ", ".join(part for part in (TITLES[name], describe_views(views)) if part)


def load_dataset(data_config: ConfigDict) -> Dataset:
    """Open the data a config names.

    Args:
      data_config: config.data. name 'chestxray14' insists on the prepared NIH images, 'image_folder' on one's own;
        'chest_phantom' draws the phantom if that was not done before; 'auto' takes the first if prepared, else the
        last, and says so.

    Returns:
      The data set, its index read from beside the records, or computed there in one pass.

    Raises:
      UserError: if the NIH images are not prepared, the prepared records are damaged, the name is unknown, or
        config.data.views names what is not there.
    """
    with naming_damage(data_config):
        return select_views(_load(data_config), data_config.views)


def _load(data_config: ConfigDict) -> Dataset:
    match data_config.name:
        case "chestxray14":
            builder = chestxray14.find_prepared(data_config)
            if builder is None:
                raise UserError(describe_lack(data_config))
            return _open(builder, "chestxray14", describe_nih(builder))
        case "chest_phantom":
            return _open_phantom(data_config, PHANTOM)
        case "auto":
            builder = chestxray14.find_prepared(data_config)
            if builder is not None:
                return _open(builder, "chestxray14", describe_nih(builder))
            reason = describe_lack(data_config)
            log.info("Using the chest phantom, which is drawn, instead of X-rays of patients. %s", reason)
            return _open_phantom(data_config, f"{PHANTOM}. {reason}")
        case "image_folder":
            return _open_folder(data_config)
        case other:
            raise UserError(f"config.data.name is '{other}'; choose one of {', '.join(('auto', *TITLES))}.")


def describe_splits(dataset: Dataset) -> str:
    """Return a table of the splits: images, positives, prevalence, patients."""
    lines = [f"{'split':<6}{'images':>9}{'positives':>11}{'prevalence':>12}{'patients':>10}"]
    for split in dataset.splits.values():
        labels = split.index["label"]
        prevalence = f"{np.mean(labels):.2%}" if len(labels) else "-"
        num_patients = len(np.unique(split.index["patient"]))
        lines.append(f"{split.name:<6}{len(labels):>9,}{np.sum(labels):>11,}{prevalence:>12}{num_patients:>10,}")
    return "\n".join(lines)


def shared_patients(dataset: Dataset) -> dict[tuple[str, str], int]:
    """Return the number of patients that each two splits have in common; above 0 for (train, dev) is a leak."""
    patients = {name: set(split.index["patient"].tolist()) for name, split in dataset.splits.items()}
    return {(a, b): len(patients[a] & patients[b]) for a, b in itertools.combinations(patients, 2)}


def _open_phantom(data_config: ConfigDict, description: str) -> Dataset:
    chest_phantom.prepare(data_config)
    return _open(chest_phantom.create_builder(data_config), "chest_phantom", description)


def _open_folder(data_config: ConfigDict) -> Dataset:
    builder = image_folder.find_prepared(data_config)
    if builder is None:
        raise UserError(
            f"the images of config.data.manual_dir={data_config.manual_dir!r} are not prepared with these fields of "
            f"config.data in '{data_config.data_dir}'; the same command with --mode=prepare does it"
        )
    return _open(builder, "image_folder", f"Images of one's own, from {data_config.manual_dir}")


def _open(builder: tfds.core.DatasetBuilder, name: str, description: str) -> Dataset:
    folder = pathlib.Path(builder.data_path)
    identity = _identity(builder)
    sources = {split: RecordSource(builder, split) for split in SPLITS}
    index = _load_index(folder / INDEX_FILE, identity)
    if index is None:
        index = _compute_index(sources, name) | {"identity": np.array(identity)}
        _save_index(folder / INDEX_FILE, index)
    splits = {
        split: Split(split, source, {field: index[f"{split}.{field}"] for field in INDEX_FIELDS})
        for split, source in sources.items()
    }
    return Dataset(
        name=name,
        image_size=builder.info.features["image"].shape[0],
        splits=splits,
        fingerprint=str(index["fingerprint"]),
        description=f"{description} [{folder}]",
    )


def _identity(builder: tfds.core.DatasetBuilder) -> str:
    """Return what ties an index to its records, as JSON: names and sizes of all files, and what they were made from.

    Checks that they are there.
    """
    folder = pathlib.Path(builder.data_path)
    shards = {}
    for split in SPLITS:
        if split not in builder.info.splits:
            raise describe_damage(folder, f"it does not know the split '{split}'")
        for path in map(pathlib.Path, builder.info.splits[split].filepaths):
            if not path.is_file():
                raise describe_damage(folder, f"{path.name} is missing")
            shards[path.name] = path.stat().st_size
    lengths = {split: builder.info.splits[split].num_examples for split in SPLITS}
    # Labels of the same length make shards of the same size: metadata.json has the digest of the label file.
    described = b"".join(path.read_bytes() for path in sorted(folder.glob("*.json")))
    identity = {"version": str(builder.version), "lengths": lengths, "shards": shards}
    return json.dumps(identity | {"described": hashlib.sha256(described).hexdigest()}, sort_keys=True)


def _compute_index(sources: dict[str, RecordSource], name: str) -> dict[str, np.ndarray]:
    digest = hashlib.sha256()
    index = {}
    with progress_bar(sum(map(len, sources.values())), f"index {name}") as progress:
        for split, source in sources.items():
            columns = {field: [] for field in INDEX_FIELDS}
            for row in range(len(source)):
                record = source[row]
                for field, column in columns.items():
                    column.append(record[field])
                digest.update(f"{split}|{record['id']}|{record['patient']}|{record['label']}|".encode())
                digest.update(record["image"].tobytes())
                progress.update()
            index |= {f"{split}.{field}": _as_column(field, column) for field, column in columns.items()}
    return index | {"fingerprint": np.array(digest.hexdigest())}


def _as_column(field: str, values: list[Any]) -> np.ndarray:
    return np.array(values, np.int32 if field in ("label", "age") else np.str_)


def _load_index(path: pathlib.Path, identity: str) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            index = dict(archive)
            expected = {"identity", "fingerprint", *(f"{split}.{field}" for split in SPLITS for field in INDEX_FIELDS)}
            if missing := expected - set(index):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except _DAMAGE as error:
        log.warning("%s cannot be read (%s); computing it anew.", path, error)
        return None
    return index if str(index["identity"]) == identity else None  # else: the records were prepared anew since


def _save_index(path: pathlib.Path, index: dict[str, np.ndarray]) -> None:
    try:
        with replace_when_written(path) as neighbour, neighbour.open("wb") as file:
            np.savez_compressed(file, **index)
    except PermissionError as error:
        log.warning("The index is computed at every start, since it cannot be kept beside the records: %s", error)
