"""Weights of the Keras applications for our backbones: every array finds its place, every place its array."""

import logging
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cxa_jax.errors import UserError
from cxa_jax.models.backbones import BACKBONES
from cxa_jax.models.keras_h5 import FileLayer, open_layers, read_array
from cxa_jax.models.keras_layout import CONV, NORM, TOP_LAYERS, KerasLayer, canonical_names, keras_layers
from cxa_jax.models.strides import STRIDE_BY, STRIDES, find_last_stride

log = logging.getLogger(__name__)

# What the published ImageNet weights were trained on; the images that go with them are normalised the same way.
KERAS_PREPROCESSING = {
    "densenet121": "imagenet_torch",  # RGB in [0, 1], minus ImageNet's mean, over its standard deviation
    "densenet201": "imagenet_torch",
    "resnet50": "imagenet_caffe",  # BGR in [0, 255], minus ImageNet's mean
    "inception_resnet_v2": "imagenet_tf",  # RGB in [-1, 1]
}

# An array's role in Keras -> our collection and leaf, in the order of a Keras layer's arrays.
PLACES = {
    CONV: {"kernel": ("params", "kernel"), "bias": ("params", "bias")},
    NORM: {
        "gamma": ("params", "scale"),
        "beta": ("params", "bias"),
        "moving_mean": ("batch_stats", "mean"),
        "moving_variance": ("batch_stats", "var"),
    },
}
Path = tuple[str, ...]


def load_keras_weights(
    backbone: str, path: str | pathlib.Path, stride: int = STRIDES[0], stride_by: str = STRIDE_BY[0]
) -> dict[str, Any]:
    """Read a Keras weight file as the variables of `BACKBONES[backbone](stride=stride, stride_by=stride_by)`.

    Reads the published applications files (`*_notop.h5`, layer groups), `model.save('x.h5')` and Keras 3's
    `.weights.h5`. Layers are matched by name where the file's names are the network's, else by their order among the
    layers of their kind. The classifier of a full file is dropped. Files are of the whole network; of a cut one the
    layers behind its end must be there too, and are left out.

    Args:
      backbone: a name in BACKBONES.
      path: the HDF5 file.
      stride: px between cells, of STRIDES.
      stride_by: 'cut' or 'dilate', how that stride is made.

    Returns:
      {'params': ..., 'batch_stats': ...}, numpy float32, for `apply(variables, images, train=False)`.

    Raises:
      UserError: the file is missing, damaged or of another network; the first mismatch is named.
    """
    if backbone not in BACKBONES:
        raise UserError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
    return load_variables(BACKBONES[backbone](stride=stride, stride_by=stride_by), path, backbone)


def load_variables(module: nn.Module, path: str | pathlib.Path, name: str) -> dict[str, Any]:
    """Read a Keras weight file as the variables of `module`, of one of the three families; errors say `name`."""
    with open_layers(path) as file_layers:
        images = jnp.zeros((1, 96, 96, 3))
        places = _flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), images)))
        try:
            is_cut = find_last_stride(module.stride, module.stride_by) < STRIDES[0]
            values = _match_arrays(keras_layers(module), _drop_top(path, file_layers), places, is_cut=is_cut)
        except _Mismatch as mismatch:
            raise UserError(f"{path} does not hold the weights of {name}: {mismatch}") from None
    return _unflatten(values)


class _Mismatch(Exception):
    """The first difference between a file and a network."""


def _match_arrays(
    layers: list[KerasLayer], file_layers: list[FileLayer], places: dict[Path, jax.ShapeDtypeStruct], *, is_cut: bool
) -> dict[Path, np.ndarray]:
    values: dict[Path, np.ndarray] = {}
    pairs, left_over = _pair_layers(layers, file_layers)
    for layer, file_layer in pairs:
        slots = [(role, (top, *layer.path, leaf)) for role, (top, leaf) in PLACES[layer.kind].items()]
        slots = [(role, place) for role, place in slots if place in places]
        if not slots and is_cut:  # a layer of the whole network, behind the end of this one
            if file_layer is None:
                raise _Mismatch(f"no layer '{layer.name}', which the whole network has")
            continue
        for k, (role, place) in enumerate(slots):
            expected = f"{'/'.join(place)} {places[place].shape} (Keras: {layer.name}/{role})"
            if file_layer is None or k >= len(file_layer.arrays):
                raise _Mismatch(f"no array for {expected}")
            array = file_layer.arrays[k]
            found, dtype = f"array '{_full_name(file_layer, k)}' {array.data.shape}", array.data.dtype
            # The shape is compared before anything is read: a wrong file may claim any size.
            if array.role not in (None, role) or array.data.shape != places[place].shape or dtype.kind != "f":
                raise _Mismatch(f"{found} {dtype} does not fit {expected}")
            values[place] = read_array(array.data)
            if not np.isfinite(values[place]).all():
                raise _Mismatch(f"{found} has values that are not finite")
        if file_layer is not None and len(file_layer.arrays) > len(slots):
            raise _Mismatch(_no_place(file_layer, len(slots)))
    if left_over:
        raise _Mismatch(_no_place(left_over[0], 0))
    assert values.keys() == places.keys(), "keras_layout.py does not cover the backbone"
    return values


def _pair_layers(
    layers: list[KerasLayer], file_layers: list[FileLayer]
) -> tuple[list[tuple[KerasLayer, FileLayer | None]], list[FileLayer]]:
    """Pair our layers with the file's; the second list is what the file has beyond them."""
    names = canonical_names([layer.name or "" for layer in file_layers])
    num_known = len(set(names) & {layer.name for layer in layers})
    if 2 * num_known > len(names) == len(set(names)):
        by_name = dict(zip(names, file_layers, strict=True))
        pairs = [(layer, by_name.pop(layer.name, None)) for layer in layers]
        return pairs, list(by_name.values())
    waiting = {CONV: [layer for layer in file_layers if _kind(layer) == CONV]}
    waiting[NORM] = [layer for layer in file_layers if _kind(layer) == NORM]
    other = [layer for layer in file_layers if _kind(layer) not in waiting]
    pairs = [(layer, waiting[layer.kind].pop(0) if waiting[layer.kind] else None) for layer in layers]
    return pairs, [*waiting[CONV], *waiting[NORM], *other]


def _kind(layer: FileLayer) -> str:
    ranks = [array.data.ndim for array in layer.arrays]
    if ranks[0] == 4:
        return CONV
    return NORM if len(ranks) in (3, 4) and set(ranks) == {1} else "other"


def _drop_top(path: str | pathlib.Path, file_layers: list[FileLayer]) -> list[FileLayer]:
    """Leave out the classifier of a full applications file: a dense layer by one of the known names."""
    kept = []
    for layer in file_layers:
        if layer.name in TOP_LAYERS and [array.data.ndim for array in layer.arrays] == [2, 1]:
            log.info("%s: dropping the classifier '%s' %s", path, layer.name, layer.arrays[0].data.shape)
        else:
            kept.append(layer)
    return kept


def _no_place(layer: FileLayer, k: int) -> str:
    return f"array '{_full_name(layer, k)}' {layer.arrays[k].data.shape} has no place in it"


def _full_name(layer: FileLayer, k: int) -> str:
    name = layer.arrays[k].name
    return name if layer.name is None or name.startswith(f"{layer.name}/") else f"{layer.name}/{name}"


def _flatten(tree: dict[str, Any]) -> dict[Path, jax.ShapeDtypeStruct]:
    return {tuple(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(values: dict[Path, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
