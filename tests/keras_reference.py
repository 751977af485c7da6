"""The Keras applications as references: built fast, with random weights and statistics. Import before keras."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import contextlib
from unittest import mock

import jax
import keras
import numpy as np
from keras.src.applications import inception_resnet_v2
from keras.src.applications.densenet import DenseNet
from keras.src.applications.resnet import ResNet, stack_residual_blocks_v1
from keras.src.backend.common import dtypes
from keras.src.initializers.random_initializers import VarianceScaling

ANY_SIZE = {"include_top": False, "weights": None, "input_shape": (None, None, 3)}
APPLICATIONS = {
    "densenet121": keras.applications.DenseNet121,
    "densenet201": keras.applications.DenseNet201,
    "resnet50": keras.applications.ResNet50,
    "inception_resnet_v2": keras.applications.InceptionResNetV2,
}
PREPROCESS = {
    "densenet121": keras.applications.densenet.preprocess_input,
    "densenet201": keras.applications.densenet.preprocess_input,
    "resnet50": keras.applications.resnet50.preprocess_input,
    "inception_resnet_v2": keras.applications.inception_resnet_v2.preprocess_input,
}


def create_application(backbone, rng, **arguments):
    """Build the full Keras network of `backbone`, randomised."""
    return _create(APPLICATIONS[backbone], rng, **ANY_SIZE | arguments)


def create_small_densenet(num_layers, rng):
    return _create(DenseNet, rng, blocks=list(num_layers), **ANY_SIZE)


def create_small_resnet(num_blocks, rng):
    def stages(x):
        for i, n in enumerate(num_blocks):
            x = stack_residual_blocks_v1(x, 64 * 2**i, n, stride1=2 if i else 1, name=f"conv{i + 2}")
        return x

    return _create(ResNet, rng, stack_fn=stages, preact=False, use_bias=True, **ANY_SIZE)


def create_small_inception_resnet_v2(num_blocks, rng):
    """Leave out residual blocks beyond `num_blocks` of each kind; the last one, without ReLU, always stays."""
    limits = dict(zip(("block35", "block17", "block8"), num_blocks, strict=True))
    full_block = inception_resnet_v2.inception_resnet_block

    def block(x, scale, block_type, block_idx, activation="relu"):
        last = limits[block_type]
        if activation is None:
            return full_block(x, scale, block_type, last, activation)
        return full_block(x, scale, block_type, block_idx) if block_idx <= last - (block_type == "block8") else x

    with mock.patch.object(inception_resnet_v2, "inception_resnet_block", block):
        return _create(keras.applications.InceptionResNetV2, rng, **ANY_SIZE)


@contextlib.contextmanager
def double_precision():
    """Compute in float64: Keras on JAX demotes it to float32 in some operations, so its table is patched."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        with jax.enable_x64(True), mock.patch.dict(dtypes.BIT64_TO_BIT32_DTYPE, {"float64": "float64"}):
            yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def _create(application, rng, **arguments):
    # Keras draws kernels by jax.random, one compilation for each shape; numpy draws them in a fraction of the time.
    def draw(self, shape, dtype=None):
        return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32).astype(dtype)

    with mock.patch.object(VarianceScaling, "__call__", draw):
        model = application(**arguments)
    for variable in model.variables:
        role = variable.path.split("/")[-1]
        if role in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape).astype(np.float32))
        elif role != "kernel":
            variable.assign(rng.normal(0, 0.1, variable.shape).astype(np.float32))
    return model


def infer(model, images, compiler_options=None):
    """Apply the model with its running statistics; returns an array for each of its outputs."""
    apply = jax.jit(
        lambda weights, x: model.stateless_call(*weights, x, training=False)[0], compiler_options=compiler_options
    )
    return jax.tree.map(np.asarray, apply(values(model), images))


def values(model):
    return [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]


def train_outputs(model, images, cotangents):
    """Return features, new statistics {path: array} and gradients {path: array} of sum(features * cotangents)."""

    def loss(trainable, fixed, x):
        features, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return (features * cotangents).sum(), (features, fixed)

    gradients, (features, fixed) = jax.jit(jax.grad(loss, has_aux=True))(*values(model), images)
    names = [v.path for v in model.trainable_variables]
    statistics = dict(zip([v.path for v in model.non_trainable_variables], fixed, strict=True))
    return features, statistics, dict(zip(names, gradients, strict=True))
