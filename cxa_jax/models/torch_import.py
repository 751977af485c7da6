"""Weights of PyTorch DenseNets (torchvision, torchxrayvision, CheXNet-like) for our backbone.

What differs from the Keras graph that ours is, and what is done about it:

  kernels     torch has [out, in, h, w], we [h, w, in, out]: transposed
  padding     7x7/2 stem: 3 on each side in both; 3x3/2 maximum: 1 on each side in both (-inf there, 0 in Keras: the
              same behind a ReLU); 2x2 averages drop an odd last row or column in both: nothing to do
  epsilon     1e-5 there, 1.001e-5 here: 1e-8 is taken from every running variance, so variance + epsilon is equal
  momentum    0.1 there is 0.9 here, and ours is Keras' 0.99: running moments follow more slowly in further training
  channels    one (torchxrayvision): a third of the kernel on each of our three equal channels, the same sum
  end         both end in norm, ReLU; the classifier behind it is dropped. A cut network's last norm is that of the
              transition there; the file is the whole network's, and what is behind the cut is checked and left out
  images      standardised by ImageNet's statistics (torchvision) or as 2048 x / 255 - 1024 (torchxrayvision):
              config.init.torch_normalization says which, and is kept with the run
"""

import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from cxa_jax.errors import UserError
from cxa_jax.models.backbones import BACKBONES
from cxa_jax.models.densenet import EPSILON, DenseNet
from cxa_jax.models.strides import STRIDE_BY, STRIDES
from cxa_jax.models.torch_files import read_state_dict

log = logging.getLogger(__name__)

TORCH_EPSILON = 1e-5
TORCH_NORMALIZATIONS = ("imagenet_torch", "xrv", "div255")
PER_CHANNEL = ("imagenet_torch",)  # whose channels differ: no one-channel stem was trained on that
NORM_ROLES = {"weight": ("params", "scale"), "bias": ("params", "bias"),
              "running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var")}  # fmt: skip
STEM = "conv0.weight"


def load_torch_weights(
    backbone: str,
    path: str | pathlib.Path,
    normalization: str,
    stride: int = STRIDES[0],
    stride_by: str = STRIDE_BY[0],
) -> dict[str, Any]:
    """Read a PyTorch state dict as the variables of `BACKBONES[backbone](stride=stride, stride_by=stride_by)`.

    Args:
      backbone: 'densenet121' or 'densenet201'.
      path: .safetensors, .pt or .pth; names as torchvision's, old or new, with any prefix.
      normalization: of the images that the weights were trained on, one of TORCH_NORMALIZATIONS.
      stride: px between cells, of STRIDES.
      stride_by: 'cut' or 'dilate', how that stride is made.

    Returns:
      {'params': ..., 'batch_stats': ...}, numpy float32, for `apply(variables, images, train=False)`.

    Raises:
      UserError: the file is unreadable or of another network (the first mismatch is named), or its stem has one
        channel and `normalization` treats channels differently.
    """
    module = BACKBONES[backbone](stride=stride, stride_by=stride_by)
    if not isinstance(module, DenseNet):
        raise UserError(f"config.init.torch_weights is for DenseNets; config.model.backbone is {backbone}")
    return load_variables(module, path, normalization)


def load_variables(module: DenseNet, path: str | pathlib.Path, normalization: str) -> dict[str, Any]:
    """Read a PyTorch state dict as the variables of any DenseNet; see `load_torch_weights`."""
    arrays = _select_backbone(read_state_dict(path), path)
    channels = arrays[STEM].shape[1] if arrays[STEM].ndim == 4 else 0
    if channels == 1 and normalization in PER_CHANNEL:
        raise UserError(
            f"{path} has a stem of one channel, as torchxrayvision's networks have: "
            "set --config.init.torch_normalization=xrv (or div255, if it was trained on images in [0, 1])"
        )
    log.info("%s: a stem of %d channel(s); images are normalised by '%s'", path, channels, normalization)
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    kept = len(module.kept_layers)
    parts = {"stem_conv", "stem_norm", "norm", *(f"block{i}" for i in range(1, kept + 1))}
    parts |= {f"transition{i}" for i in range(1, kept)}
    for name, place, shape in _expected(module):
        array = arrays.pop(name, None)
        if name == STEM and channels == 1 and array is not None:
            array = np.repeat(np.asarray(array, np.float64) / 3, 3, axis=1)
        if array is None or array.shape != shape or array.dtype.kind not in "fV":
            found = "is missing" if array is None else f"is {array.dtype} {list(array.shape)}"
            raise UserError(f"{path} is no DenseNet {module.num_layers}: {name} {found}, needed is {list(shape)}")
        values = _convert(array, place, f"{path}: {name}")
        if place[1] in parts:  # else the network is cut before it
            _put(variables, place, values)
    if arrays:
        raise UserError(f"{path} is no DenseNet {module.num_layers}: nothing here for {sorted(arrays)[0]}")
    return variables


def _select_backbone(state: dict[str, np.ndarray], path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of the convolutional part by torchvision's newer names, without prefix."""
    stems = [name for name in state if name == STEM or name.endswith(f".{STEM}")]
    if len(stems) != 1:
        raise UserError(f"{path} is no DenseNet of torchvision's names: {len(stems)} arrays are called ...{STEM}")
    prefix = stems[0].removesuffix(STEM)
    inside = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    # torchvision before 0.3 wrote denselayer1.norm.1.weight
    inside = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", name): array for name, array in inside.items()}
    dropped = [name for name in state if not name.startswith(prefix)]
    dropped += [prefix + name for name in inside if name.startswith("classifier.")]
    if dropped:
        log.info("%s: dropping %s", path, ", ".join(dropped))
    unused = ("num_batches_tracked",)
    return {
        name: array
        for name, array in inside.items()
        if not name.endswith(unused) and not name.startswith("classifier.")
    }


def _expected(module: DenseNet) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Yield torchvision's name, our place (collection, module, ..., leaf) and torch's shape of every array."""
    yield STEM, ("params", "stem_conv", "kernel"), (64, 3, 7, 7)
    yield from _norm("norm0", ("stem_norm",), 64)
    channels = 64
    for i, n in enumerate(module.num_layers, start=1):
        if i > 1:
            yield from _norm(f"transition{i - 1}.norm", module.find_norm(i - 1), channels)
            place = ("params", f"transition{i - 1}", "conv", "kernel")
            yield f"transition{i - 1}.conv.weight", place, (channels // 2, channels, 1, 1)
            channels //= 2
        for j in range(1, n + 1):
            name, path = f"denseblock{i}.denselayer{j}", (f"block{i}", f"layer{j}")
            yield from _norm(f"{name}.norm1", (*path, "norm1"), channels)
            yield f"{name}.conv1.weight", ("params", *path, "conv1", "kernel"), (128, channels, 1, 1)
            yield from _norm(f"{name}.norm2", (*path, "norm2"), 128)
            yield f"{name}.conv2.weight", ("params", *path, "conv2", "kernel"), (32, 128, 3, 3)
            channels += 32
    yield from _norm("norm5", module.find_norm(len(module.num_layers)), channels)


def _norm(name: str, path: tuple[str, ...], channels: int) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    for role, (collection, leaf) in NORM_ROLES.items():
        yield f"{name}.{role}", (collection, *path, leaf), (channels,)


def _convert(array: np.ndarray, place: tuple[str, ...], name: str) -> np.ndarray:
    values = np.asarray(array, np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{name} has values that are not finite")
    if place[-1] == "kernel":
        values = values.transpose(2, 3, 1, 0)
    if place[-1] == "var":
        values = values + (TORCH_EPSILON - EPSILON)
    return values.astype(np.float32)


def _put(tree: dict[str, Any], place: tuple[str, ...], value: np.ndarray) -> None:
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
    tree[place[-1]] = value
