"""Keras 3: the backbone of keras.applications under the same AMM and head, on JAX or TensorFlow, by train_on_batch."""

import os

from protocol import (
    AMM_WIDTHS,
    CLASS_WEIGHTS,
    DROPOUT,
    HEAD_WIDTH,
    LEARNING_RATE,
    MOMENTUM,
    RUN_STEPS,
    parse_arguments,
    serve,
)

arguments = parse_arguments(backend=("jax", "tensorflow"))
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  (reads KERAS_BACKEND)
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

BACKBONES = {
    "densenet121": keras.applications.DenseNet121,
    "densenet201": keras.applications.DenseNet201,
    "resnet50": keras.applications.ResNet50,
    "inception_resnet_v2": keras.applications.InceptionResNetV2,
}


class WeightedAverage(layers.Layer):
    """Eq. (9): features [B, h, w, C] and weights [B, h, w, 1] -> sum(W F) / sum(W), [B, C]."""

    def call(self, features, weights):
        """Return the pooled features."""
        return ops.sum(weights * features, axis=(1, 2)) / ops.sum(weights, axis=(1, 2))


def build_model() -> keras.Model:
    """Return the compiled network of Table 3."""
    shape = (arguments.image_size, arguments.image_size, 3)
    backbone = BACKBONES[arguments.backbone](weights=None, include_top=False, input_shape=shape)
    normalized = layers.BatchNormalization()(backbone.output)
    x = normalized
    for width in AMM_WIDTHS:
        x = layers.Conv2D(width, 1, activation="elu")(x)
    x = layers.AveragePooling2D(2, strides=1, padding="same")(x)
    attention = layers.Conv2D(1, 1, activation="sigmoid")(x)
    x = layers.Dropout(DROPOUT)(WeightedAverage()(normalized, attention))
    x = layers.Dropout(DROPOUT)(layers.Dense(HEAD_WIDTH, activation="elu")(x))
    model = keras.Model(backbone.input, layers.Dense(1, activation="sigmoid")(x))
    model.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), loss="binary_crossentropy")
    return model


model = build_model()
rng = np.random.default_rng(0)
images = rng.random((arguments.batch_size, arguments.image_size, arguments.image_size, 3), np.float32)
labels = (np.arange(arguments.batch_size) % 2).astype(np.float32)[:, None]
class_weight = dict(enumerate(CLASS_WEIGHTS))


def train() -> float:
    """Run one step to its loss on the host."""
    return float(model.train_on_batch(images, labels, class_weight=class_weight))


serve(
    arguments.first,
    {
        "train": train,
        "train_run": lambda: [train() for _ in range(RUN_STEPS)][-1],
        "predict": lambda: np.asarray(model.predict_on_batch(images)),
        "predict_one": lambda: np.asarray(model.predict_on_batch(images[:1])),
    },
    {
        "keras": keras.__version__,
        "backend": f"{arguments.backend} {__import__(arguments.backend).__version__}",
        "num_params": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
    },
)
