"""A network in one safetensors file: parameters, batch norm's statistics, and in words all that predictions need.

Tensors are called as the tree has them, 'params/backbone/stem_conv/kernel'. Parameters are float32 or float16;
statistics, few numbers of which some are large, float32. The only metadata is one JSON object under the key 'cxa_jax';
its fields are those of DESCRIPTION. Nothing in it is run, and no name in it is a path that is followed.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from cxa_jax.array_types import PyTree
from cxa_jax.atomic_files import replace_when_written
from cxa_jax.companion_files import COMPANIONS
from cxa_jax.digests import digest_arrays
from cxa_jax.errors import UserError

FORMAT_VERSION = 1
KEY = "cxa_jax"
DTYPES = ("float16", "float32")
COLLECTIONS = ("params", "batch_stats")
_OPTIONAL = type(None)
# Every field of the description with its types in JSON.
DESCRIPTION = {
    "format_version": (int,),
    "tensors_sha256": (str,),  # of names, types, shapes and values
    "dtype": (str,),  # of the parameters, one of DTYPES
    "dtype_reason": (str,),  # why it is that
    "largest_logit_difference": (float, int, _OPTIONAL),  # from float32 over the dev images; None: not measured
    "config": (dict,),  # flat; of places the last part alone
    "normalization": (str,),  # of the input, as `cxa_jax.data.augment` names it
    "threshold": (float, int),
    "threshold_origin": (str,),
    "calibration": (dict, _OPTIONAL),  # scale, bias
    "is_phantom": (bool,),  # trained on drawings
    "box_rule": (dict,),  # the fields of `heat_maps.Rule`
    "progress": (dict,),  # best_step, epoch, best_loss
    "fingerprint": (str,),  # of the data set
    "views": (dict, _OPTIONAL),  # training images of each view; None: unknown
    "companions": (dict,),  # contents of the workdir's small files, by their names
}
_PARTS = {"calibration": ("scale", "bias"), "progress": ("best_step", "epoch", "best_loss")}  # numbers all


class StoredWeights(NamedTuple):
    """What a weights file holds.

    Attributes:
      path: of the file.
      tensors: float32, by name.
      description: the fields of DESCRIPTION.
    """

    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    description: dict[str, Any]

    def to_tree(self, abstract: PyTree) -> PyTree:
        """Return the tensors as a tree of these shapes.

        Raises:
          UserError: a tensor is missing, of another shape, or belongs to no place.
        """
        wanted = flatten_variables(abstract)
        missing, extra = sorted(wanted.keys() - self.tensors.keys()), sorted(self.tensors.keys() - wanted.keys())
        wrong = [
            f"{name} is {list(self.tensors[name].shape)}, not {list(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in self.tensors and self.tensors[name].shape != leaf.shape
        ]
        problems = [*(f"{name} is missing" for name in missing), *wrong, *(f"{name} has no place" for name in extra)]
        if problems:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise UserError(f"{self.path} does not hold the network that its config names: {problems[0]}{more}")
        return jax.tree.unflatten(jax.tree.structure(abstract), [self.tensors[name] for name in wanted])


def flatten_variables(variables: PyTree) -> dict[str, Any]:
    """Return the leaves of {'params', 'batch_stats'} by their names, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def round_parameters(variables: PyTree, dtype: str) -> PyTree:
    """Return {'params', 'batch_stats'} as numpy float32, the parameters with no more digits than `dtype` has."""
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which whoever measures will see
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype).astype(np.float32), dict(variables["params"]))
    statistics = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(variables["batch_stats"]))
    return {"params": params, "batch_stats": statistics}


def write_weights(path: pathlib.Path, variables: PyTree, description: Mapping[str, Any]) -> None:
    """Write a weights file, all or nothing.

    Args:
      path: of the file.
      variables: {'params', 'batch_stats'}, float arrays.
      description: the fields of DESCRIPTION but the version and the tensors' digest.
    """
    types = {"params": description["dtype"], "batch_stats": "float32"}
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, types[name.split("/")[0]]))
        for name, leaf in flatten_variables({name: dict(variables[name]) for name in COLLECTIONS}).items()
    }
    description = {"format_version": FORMAT_VERSION, "tensors_sha256": digest_arrays(tensors)} | dict(description)
    _check_description(path, description)
    content = safetensors.numpy.save(tensors, {KEY: json.dumps(description, allow_nan=False)})
    with replace_when_written(path) as neighbour:
        neighbour.write_bytes(content)


def read_weights(path: pathlib.Path) -> StoredWeights:
    """Read what `write_weights` wrote.

    Raises:
      UserError: no such file, one that is truncated or altered, no weights file of this project, or one of another
        version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}): it is cut or altered") from error
    if text is None:
        raise UserError(f"{path} is no weights file of this project: its metadata have no {KEY!r}; see --mode=export")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its metadata are no JSON ({error})") from error
    _check_description(path, description)
    if digest_arrays(tensors) != description["tensors_sha256"]:
        raise UserError(f"{path} is damaged: its tensors are not those that were written (SHA-256 differs)")
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES:
            raise UserError(f"{path} is damaged: {name} is {tensor.dtype}, not {' or '.join(DTYPES)}")
        if not np.isfinite(tensor).all():
            raise UserError(f"{path} is damaged: {name} has values that are not finite")
    return StoredWeights(path, {name: np.asarray(value, np.float32) for name, value in tensors.items()}, description)


def _check_description(path: pathlib.Path, description: Any) -> None:
    if not isinstance(description, dict) or not isinstance(description.get("format_version"), int):
        raise UserError(f"{path} is damaged: its metadata name no format_version")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format version {version}, and this version of the project reads {FORMAT_VERSION}: use the "
            "version that wrote it, or export its run again"
        )
    for field, types in DESCRIPTION.items():
        if field not in description:
            raise UserError(f"{path} is damaged: its metadata lack {field!r}")
        value = description[field]
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not is_right or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path} is damaged: {field} is {repr(value)[:80]}")
    for field, names in _PARTS.items():
        for name in names if description[field] is not None else ():
            value = description[field].get(name)
            if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"{path} is damaged: {field}.{name} is {repr(value)[:80]}")
    if description["dtype"] not in DTYPES:
        raise UserError(f"{path} is damaged: dtype is {description['dtype']!r}")
    strangers = sorted(set(description["companions"]) - set(COMPANIONS))
    if strangers:
        raise UserError(f"{path} carries {strangers[0]}, which this version does not know: use the one that wrote it")
