"""What one stored image looks like: the features both builders write and every reader gets back."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

TEXT_FEATURES = ("id", "patient", "findings", "view", "sex")


def record_features(image_size: int, with_heart: bool) -> tfds.features.FeaturesDict:
    """Return the TFDS features of one record.

    Images are raw bytes, not PNG: they read 10-20 times faster, and without TensorFlow.

    Args:
      image_size: S, side of the stored image in px.
      with_heart: True for phantoms, which also know the heart's mask and the cardiothoracic ratio.

    Returns:
      Features with image uint8 [S, S, 1]; id, patient, findings ('A|B' or 'No Finding'), view, sex as text; label int64
      (1 = cardiomegaly, 0 = no finding); age int64 in years (-1 unknown); boxes float32 [N, 4] as x, y, w, h in stored
      px. With `with_heart` also heart_mask uint8 [S, S, 1] (0 or 1) and ctr float32.
    """
    features = {
        "image": _pixels(image_size),
        "label": np.int64,
        "age": np.int64,
        "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
    }
    features |= {name: tfds.features.Text() for name in TEXT_FEATURES}
    if with_heart:
        features["heart_mask"] = _pixels(image_size)
        features["ctr"] = np.float32
    return tfds.features.FeaturesDict(features)


def decode(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as read from disk with its text as `str`; arrays and numbers pass through."""
    return {name: value.decode() if name in TEXT_FEATURES else value for name, value in record.items()}


def decode_image(record: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return the image of a record, uint8, read-only, without what TFDS does for features of all kinds.

    Raises:
      ValueError: the record has no image of that shape.
      DecodeError: it is no record.
    """
    stored = tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value
    if len(stored) != 1:
        raise ValueError("a record without an image")
    return np.frombuffer(stored[0], np.uint8).reshape(shape)


def _pixels(image_size: int) -> tfds.features.Tensor:
    shape = (image_size, image_size, 1)
    return tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
