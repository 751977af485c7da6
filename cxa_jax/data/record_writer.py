"""A TFDS writer whose files are the same, byte for byte, in every run."""

import contextlib
import io
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from cxa_jax.errors import UserError
from cxa_jax.file_lock import lock_file

log = logging.getLogger(__name__)


# A record is read alone, so each is a group of its own. X-rays shrink by a tenth, and would take three times as long to
# read and ten times as long to write.
_OPTIONS = "group_size:1,uncompressed"


class RepeatableWriter(tfds.core.ExampleWriter):
    """Writes array records with their fields in a fixed order; protobuf's own differs from process to process."""

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[str, bytes]]) -> None:
        """Write (key, serialized example) pairs to one file."""
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), _OPTIONS)
        try:
            for _, record in examples:
                writer.write(_order_fields(record))
        finally:
            writer.close()


def _order_fields(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def write_records(builder: tfds.core.DatasetBuilder) -> None:
    """Prepare `builder` on disk: all of it or nothing, and without TFDS' talk of downloads, for there are none.

    Of two processes that prepare the same, the second waits and then finds it there. What a killed one left is removed.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(builder.data_path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / ".lock", lambda holder: log.info("%s prepares %s: waiting", holder, builder.data_path)):
            for leftover in folder.glob("incomplete.*"):
                log.info("removing %s, left by an interrupted preparation", leftover)
                shutil.rmtree(leftover)
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError as error:
        raise UserError(f"config.data.data_dir: cannot write {builder.data_path}: {error}") from error
