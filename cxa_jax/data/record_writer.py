"""A TFDS writer whose files are the same, byte for byte, in every run."""

import contextlib
import io
import os
from collections.abc import Iterable

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cxa_jax.errors import UserError


class RepeatableWriter(tfds.core.ExampleWriter):
    """Writes records with their fields in a fixed order; protobuf's own order differs from process to process."""

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[str, bytes]]) -> None:
        """Write (key, serialized example) pairs to one file."""
        return super().write(path, ((key, _order_fields(record)) for key, record in examples))


def _order_fields(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def write_records(builder: tfds.core.DatasetBuilder) -> None:
    """Prepare `builder` on disk: all of it or nothing, and without TFDS' talk of downloads, for there are none.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError as error:
        if not builder.is_prepared():  # else another process prepared the same meanwhile
            raise UserError(f"config.data.data_dir: cannot write {builder.data_path}: {error}") from error
