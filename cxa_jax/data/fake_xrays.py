"""Noise in the shape of X-rays, for timing alone: in memory, or prepared on disk as real images are."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cxa_jax.data.datasets import INDEX_FIELDS, SPLITS, Dataset, RecordSource, Split
from cxa_jax.data.record_writer import RepeatableWriter, write_records
from cxa_jax.data.records import record_features

_DESCRIPTION = "Noise: bytes drawn uniformly, labels in turn. Good for timing and for nothing else."


class FakeXrays(tfds.core.ShardBasedBuilder):
    """Noise images as one split, 'train'. Source: a random generator; no patient, no licence, nothing is downloaded."""

    name = "fake_xrays"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded, so there are no checksums to look for

    def __init__(self, *, image_size: int, num_images: int, data_dir: str | os.PathLike):
        """Name the images; nothing is written before `write_records`."""
        self._image_size, self._num_images = image_size, num_images
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = record_features(self._image_size, with_heart=False)
        return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features)

    def _example_writer(self) -> RepeatableWriter:
        return RepeatableWriter(file_format=self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list]:
        return {"train": [self._make_examples]}

    def _make_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in _draw_records(self._image_size, self._num_images):
            yield record["id"], record


def make_fake_dataset(image_size: int, num_images: int) -> Dataset:
    """Return noise images in memory, uint8 [image_size, image_size, 1]; every second one is positive."""
    records = list(_draw_records(image_size, num_images))
    splits = {name: Split(name, records, _make_index(records)) for name in SPLITS}
    # By this name it has findings too, as some configs need; nothing that is kept ever names it.
    return Dataset("chestxray14", image_size, splits, "fake", _DESCRIPTION)


def prepare_fake_split(folder: str | os.PathLike, image_size: int, num_images: int) -> Split:
    """Write noise images to `folder` as a prepared data set lies there, and return them as read from there.

    Raises:
      UserError: the folder cannot be written.
    """
    builder = FakeXrays(image_size=image_size, num_images=num_images, data_dir=folder)
    write_records(builder)
    source = RecordSource(builder, "train")
    return Split("train", source, _make_index([source[row] for row in range(len(source))]))


def _draw_records(image_size: int, num_images: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for i in range(num_images):
        yield {
            "image": rng.integers(0, 256, (image_size, image_size, 1), np.uint8),
            "id": f"fake{i:06d}",
            "patient": f"fake{i:06d}",
            "label": i % 2,
            "findings": "Cardiomegaly" if i % 2 else "No Finding",
            "view": "PA",
            "sex": "F",
            "age": 50,
            "boxes": np.zeros((0, 4), np.float32),
        }


def _make_index(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    index = {field: np.array([record[field] for record in records]) for field in INDEX_FIELDS}
    return index | {field: index[field].astype(np.int32) for field in ("label", "age")}
