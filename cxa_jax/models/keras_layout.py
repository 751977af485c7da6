"""Where each layer of the Keras applications stands in our variables: its Keras name, its kind and our path."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn

from cxa_jax.models import inception_resnet_v2 as inception
from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.resnet import ResNet

CONV, NORM = "conv", "norm"
AUTO_NAMES = ("conv2d", "batch_normalization")  # Keras numbers layers without a name of their own: conv2d_17
TOP_LAYERS = ("predictions", "fc1000")  # the classifier of a full file; we have no place for it


class KerasLayer(NamedTuple):
    """A layer with weights: its name in Keras, its kind (CONV or NORM) and the path of our submodule."""

    name: str
    kind: str
    path: tuple[str, ...]


def keras_layers(backbone: nn.Module) -> list[KerasLayer]:
    """List the layers of a backbone, those of one kind in the order of Keras' `model.layers` and so of weight files.

    That order is by distance from the output, so the layers of parallel branches alternate. Automatic names are in the
    order of creation, branch by branch, and counted from 0: 'conv2d_0'. Of a cut backbone these are the whole network's
    layers, as files have them; nothing of it stands at the paths behind its last stage.
    """
    if isinstance(backbone, DenseNet):
        return list(_densenet(backbone))
    if isinstance(backbone, ResNet):
        return list(_resnet(backbone.num_blocks))
    if isinstance(backbone, inception.InceptionResNetV2):
        return list(_inception_resnet_v2(backbone.num_blocks))
    raise TypeError(f"{type(backbone).__name__} has no counterpart among the Keras applications")


def _densenet(backbone: DenseNet) -> Iterator[KerasLayer]:
    yield KerasLayer("conv1_conv", CONV, ("stem_conv",))
    yield KerasLayer("conv1_bn", NORM, ("stem_norm",))
    for i, n in enumerate(backbone.num_layers, start=1):
        if i > 1:
            yield KerasLayer(f"pool{i}_bn", NORM, backbone.find_norm(i - 1))
            yield KerasLayer(f"pool{i}_conv", CONV, (f"transition{i - 1}", "conv"))
        for j in range(1, n + 1):
            name, path = f"conv{i + 1}_block{j}", (f"block{i}", f"layer{j}")
            yield KerasLayer(f"{name}_0_bn", NORM, (*path, "norm1"))
            yield KerasLayer(f"{name}_1_conv", CONV, (*path, "conv1"))
            yield KerasLayer(f"{name}_1_bn", NORM, (*path, "norm2"))
            yield KerasLayer(f"{name}_2_conv", CONV, (*path, "conv2"))
    yield KerasLayer("bn", NORM, backbone.find_norm(len(backbone.num_layers)))


def _resnet(num_blocks: Sequence[int]) -> Iterator[KerasLayer]:
    yield KerasLayer("conv1_conv", CONV, ("stem_conv",))
    yield KerasLayer("conv1_bn", NORM, ("stem_norm",))
    for i, n in enumerate(num_blocks, start=1):
        for j in range(1, n + 1):
            name, path = f"conv{i + 1}_block{j}", f"stage{i}_block{j}"
            for k in (1, 2):
                yield KerasLayer(f"{name}_{k}_conv", CONV, (path, f"conv{k}"))
                yield KerasLayer(f"{name}_{k}_bn", NORM, (path, f"norm{k}"))
            if j == 1:
                yield KerasLayer(f"{name}_0_conv", CONV, (path, "shortcut_conv"))
                yield KerasLayer(f"{name}_0_bn", NORM, (path, "shortcut_norm"))
            yield KerasLayer(f"{name}_3_conv", CONV, (path, "conv3"))
            yield KerasLayer(f"{name}_3_bn", NORM, (path, "norm3"))


def _inception_resnet_v2(num_blocks: Sequence[int]) -> Iterator[KerasLayer]:
    num_named = 0  # automatic names given so far
    for prefix, branches, projected in _inception_parts(*num_blocks):
        lengths = [sum(isinstance(step, inception.Conv) for step in branch) for branch in branches]
        created = [(b, i) for b, n in enumerate(lengths, 1) for i in range(1, n + 1)]
        # Branches meet at their ends, so Keras' order is by the distance from there; the sort is stable.
        for b, i in sorted(created, key=lambda step: lengths[step[0] - 1] - step[1], reverse=True):
            number = num_named + created.index((b, i))
            path = (*prefix, f"branch{b}_conv{i}")
            yield KerasLayer(f"conv2d_{number}", CONV, (*path, "conv"))
            yield KerasLayer(f"batch_normalization_{number}", NORM, (*path, "norm"))
        num_named += len(created)
        if projected:
            yield KerasLayer(f"{prefix[0]}_conv", CONV, (prefix[0], "conv"))
    yield KerasLayer("conv_7b", CONV, ("conv_7b", "conv"))
    yield KerasLayer("conv_7b_bn", NORM, ("conv_7b", "norm"))


def _inception_parts(
    num_block35: int, num_block17: int, num_block8: int
) -> Iterator[tuple[tuple[str, ...], tuple[inception.Branch, ...], bool]]:
    """Yield (path, branches, whether a residual block's projection follows) from the image to the features."""
    yield ("stem",), (inception.STEM,), False
    yield ("mixed_5b",), inception.MIXED_5B, False
    for i in range(1, num_block35 + 1):
        yield (f"block35_{i}", "branches"), inception.BLOCK35, True
    yield ("mixed_6a",), inception.MIXED_6A, False
    for i in range(1, num_block17 + 1):
        yield (f"block17_{i}", "branches"), inception.BLOCK17, True
    yield ("mixed_7a",), inception.MIXED_7A, False
    for i in range(1, num_block8 + 1):
        yield (f"block8_{i}", "branches"), inception.BLOCK8, True


def canonical_names(names: Sequence[str]) -> list[str]:
    """Rewrite a file's layer names as `keras_layers` has them.

    'conv1/conv' (published DenseNets) becomes 'conv1_conv', 'res2a_branch2b' (an older ResNet-50) becomes
    'conv2_block1_2_conv'; automatic numbers, which go on counting when a process builds several models, become ranks:
    'conv2d_204', if it is the lowest, 'conv2d_0'.
    """
    plain = [_rename_resnet(name.replace("/", "_")) for name in names]
    ranks = {}
    for stem in AUTO_NAMES:
        numbers = {name: int(m[1] or 0) for name in plain if (m := re.fullmatch(stem + r"(?:_(\d+))?", name))}
        ranks |= {name: f"{stem}_{rank}" for rank, name in enumerate(sorted(numbers, key=numbers.get))}
    return [ranks.get(name, name) for name in plain]


def _rename_resnet(name: str) -> str:
    if name == "bn_conv1":
        return "conv1_bn"
    if name == "conv1":
        return "conv1_conv"
    match = re.fullmatch(r"(res|bn)(\d)([a-f])_branch(1|2([abc]))", name)
    if not match:
        return name
    kind, stage, block, _, step = match.groups()
    position = "abc".index(step) + 1 if step else 0
    return f"conv{stage}_block{'abcdef'.index(block) + 1}_{position}_{'conv' if kind == 'res' else 'bn'}"
