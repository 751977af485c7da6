"""A TFDS writer whose files are the same, byte for byte, in every run."""

import os
from collections.abc import Iterable

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2


class RepeatableWriter(tfds.core.ExampleWriter):
    """Writes records with their fields in a fixed order; protobuf's own order differs from process to process."""

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[str, bytes]]) -> None:
        """Write (key, serialized example) pairs to one file."""
        return super().write(path, ((key, _order_fields(record)) for key, record in examples))


def _order_fields(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
