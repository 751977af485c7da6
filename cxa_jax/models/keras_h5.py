"""Keras weight files as lists of layers with arrays, by h5py alone: the layer-group HDF5 layout and `.weights.h5`."""

import contextlib
import itertools
import logging
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import h5py
import numpy as np

from cxa_jax.errors import UserError

log = logging.getLogger(__name__)

NOT_WEIGHTS = ("optimizer", "optimizer_weights", "metrics")  # groups that a compiled model adds
ALIASES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}  # Keras 1
ROLES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
ROLE_PATTERN = re.compile(rf"(?:^|[/_])({'|'.join((*ROLES, *ALIASES))})(?:_\d+)?(?::0)?$")


class FileArray(NamedTuple):
    """An array of a file: its name there, its role ('kernel', ...; None where the file does not say) and its data."""

    name: str
    role: str | None
    data: h5py.Dataset


class FileLayer(NamedTuple):
    """A layer that has arrays: its name in Keras (None where the file does not say) and the arrays in Keras' order."""

    name: str | None
    arrays: list[FileArray]


@contextlib.contextmanager
def open_layers(path: str | pathlib.Path) -> Iterator[list[FileLayer]]:
    """Open a Keras weight file and give its layers in the file's order; arrays are read on access.

    Raises:
      UserError: no such file, not HDF5, damaged, or of neither layout.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give a Keras weight file (*.h5)")
    if zipfile.is_zipfile(path) and not h5py.is_hdf5(path):
        raise UserError(f"{path} is a zip archive (.keras?): unzip it and give the model.weights.h5 in it")
    try:
        with h5py.File(path, "r") as file:
            try:
                layers = _read_layers(path, file)
            except (KeyError, RuntimeError, AttributeError, TypeError, UnicodeError) as error:  # damaged structures
                raise _unreadable(path, error) from error
            yield layers
    except OSError as error:  # not HDF5, cut, or damaged where an array lies
        raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a readable HDF5 weight file ({error}): fetch or write it again")


def _read_layers(path: pathlib.Path, file: h5py.File) -> list[FileLayer]:
    ignored = [name for name in NOT_WEIGHTS if name in file]
    if ignored:
        log.info("%s: ignoring %s", path, ", ".join(ignored))
    root = file.get("model_weights", file)
    if "layer_names" in root.attrs or "layer_names0" in root.attrs:
        layers = _layer_groups(root)
    else:
        layers = _variable_groups(root)
    if not layers:
        raise UserError(f"{path} holds no Keras weights: no attribute 'layer_names', no groups 'vars' with arrays")
    known = {array.data.name for layer in layers for array in layer.arrays}
    for dataset in _datasets(root):
        if dataset.name not in known and dataset.name.split("/")[1] not in NOT_WEIGHTS:
            raise UserError(f"{path}: array '{dataset.name}' {dataset.shape} belongs to no layer")
    return layers


def _layer_groups(root: h5py.Group) -> list[FileLayer]:
    """Read the layout of Keras 1 and 2 and of the published files: attributes list the layers, and their arrays."""
    layers = []
    for layer_name in _text_attribute(root, "layer_names"):
        group = root[layer_name]
        arrays = [FileArray(name, _role(name), group[name]) for name in _text_attribute(group, "weight_names")]
        if arrays:
            layers.append(FileLayer(layer_name, arrays))
    return layers


def _text_attribute(group: h5py.Group, name: str) -> list[str]:
    """Read a list of names; Keras cuts a long one into `name0`, `name1`, ..., as an HDF5 header holds 64 kB."""
    pieces = itertools.takewhile(group.attrs.__contains__, (f"{name}{i}" for i in itertools.count()))
    keys = [name] if name in group.attrs else pieces
    values = [value for key in keys for value in group.attrs[key]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _role(array_name: str) -> str | None:
    match = ROLE_PATTERN.search(array_name)
    return ALIASES.get(match[1], match[1]) if match else None


def _variable_groups(root: h5py.Group) -> list[FileLayer]:
    """Read the layout of Keras 3: layers/<class>_<number>/vars/<number>, the layer's name an attribute of `vars`.

    Numbers count the layers of one class; across classes the file has no order.
    """
    groups: dict[str, list[h5py.Dataset]] = {}
    for dataset in _datasets(root):
        if dataset.name.split("/")[1] not in NOT_WEIGHTS and dataset.parent.name.endswith("/vars"):
            groups.setdefault(dataset.parent.name, []).append(dataset)
    layers = []
    for group_name in sorted(groups, key=_natural_key):
        name = root[group_name].attrs.get("name")
        arrays = sorted(groups[group_name], key=lambda dataset: _natural_key(dataset.name))
        layers.append(FileLayer(name, [FileArray(array.name.lstrip("/"), None, array) for array in arrays]))
    return layers


def _datasets(root: h5py.Group) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    root.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def _natural_key(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.removesuffix("/vars"))]


def read_array(dataset: h5py.Dataset) -> np.ndarray:
    """Read floating-point data as float32."""
    return np.asarray(dataset[()], np.float32)
