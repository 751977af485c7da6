"""The fields of view on docs/models.md: added up from windows, and as far as a cell's gradient reaches."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_variables import constant_variables
from quick import jit, slow

from cxa_jax.models.densenet import DenseNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet

sys.path.append(str(pathlib.Path(__file__).parents[1] / "docs"))
from fields_of_view import find_field

SIZE, CELL = 256, 6


@pytest.mark.parametrize(
    "module",
    [
        DenseNet((2, 1, 1, 1), stride=8),
        slow(DenseNet((1, 1, 1, 1), stride=16)),
        slow(DenseNet((1, 1, 1, 1), stride=16, stride_by="dilate")),
        slow(ResNet((1, 1, 1, 1), stride=8)),
        slow(InceptionResNetV2((1, 1, 1), stride=8)),
    ],
)
def test_the_gradient_reaches_as_far_and_no_farther(module):
    images = np.random.default_rng(0).uniform(0, 1, (4, SIZE, SIZE, 3)).astype(np.float32)
    closed = jax.make_jaxpr(module.init_with_output)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    field = find_field(closed.jaxpr, 1)[0]
    assert (field.stride, (field.low + field.high) / 2) == (module.stride, module.offset)
    gradient = jit(jax.grad(lambda x, v: module.apply(v, x)[:, CELL, CELL].sum()))(images, constant_variables(module))
    seen = np.asarray(gradient).any((0, 3))
    for axis in (0, 1):
        (pixels,) = np.nonzero(seen.any(1 - axis))
        assert (pixels[0], pixels[-1]) == (field.low + field.stride * CELL, field.high + field.stride * CELL)
        assert pixels[0] > 0 and pixels[-1] < SIZE - 1  # no edge cut it off
