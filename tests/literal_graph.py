"""Table 3 as a literal Keras graph: frozen convolution of ones, two global averages, their ratio."""

import keras
import numpy as np

LAYERS = {  # Keras' layer -> our path
    "norm": ("amm", "norm"),
    "conv1": ("amm", "conv1"),
    "conv2": ("amm", "conv2"),
    "conv3": ("amm", "conv3"),
    "conv4": ("amm", "conv4"),
    "dense1": ("classifier", "dense1"),
    "dense2": ("classifier", "logit"),
}
LEAVES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


def attention_and_head(features):
    """Build the graph on a Keras tensor of features: returns score [B, 1], attention [B, h, w, 1] and pooled [B, C].

    Dropout is left out: it is random in either library, and both networks are compared without it.
    """
    layers = keras.layers
    normalized = layers.BatchNormalization(name="norm")(features)
    x = normalized
    for i, width in enumerate((128, 32, 16), start=1):
        x = layers.Conv2D(width, 1, padding="same", activation="elu", name=f"conv{i}")(x)
    x = layers.AveragePooling2D(2, strides=1, padding="same")(x)
    attention = layers.Conv2D(1, 1, padding="valid", activation="sigmoid", name="conv4")(x)
    ones = layers.Conv2D(features.shape[-1], 1, use_bias=False, kernel_initializer="ones", trainable=False, name="ones")
    copied = ones(attention)
    masked = layers.Multiply()([copied, normalized])
    pooled = layers.GlobalAveragePooling2D()(masked) / layers.GlobalAveragePooling2D()(copied)
    hidden = layers.Dense(128, activation="elu", name="dense1")(pooled)
    return layers.Dense(1, activation="sigmoid", name="dense2")(hidden), attention, pooled


def as_ours(paths, values):
    """Arrange Keras' arrays as our variables; the frozen ones have no place there."""
    tree = {"params": {}, "batch_stats": {}}
    for path, value in zip(paths, values, strict=True):
        layer, leaf = path.split("/")[-2:]
        if layer in LAYERS:
            (top, name), (module, submodule) = LEAVES[leaf], LAYERS[layer]
            tree[top].setdefault(module, {}).setdefault(submodule, {})[name] = np.asarray(value)
    return tree
