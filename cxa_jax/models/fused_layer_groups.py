"""Layers of a dense block in loops: a few that read nearly as many channels are compiled as one.

Layer l of a block with C input channels reads C + growth l of them, and XLA compiles every width anew: a dozen
programs for each of DenseNet-121's 58 layers. But a layer may read more channels than its own if their scale, bias and
rows of the kernel are zeros: relu(0 S + 0) = 0, and nothing comes back either. So n layers in a row read as many
channels as the last of them, and their parameters, filled up with zeros, are stacked and looped over.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cxa_jax.array_types import PyTree
from cxa_jax.models.fused_norms import Affine

MIN_SIZE, MAX_SIZE = 4, 8  # layers of a loop; the parameters of fewer take as many programs to stack as the loop saves


class LayerParams(NamedTuple):
    """Parameters of one dense layer: norms, kernel1 [1, 1, c, 128], kernel2 [3, 3, 128, 32]; or of a stack of such."""

    norm1: Affine
    kernel1: jax.Array
    norm2: Affine
    kernel2: jax.Array

    @property
    def num_inputs(self) -> int:
        """The channels c that the layer reads."""
        return self.norm1.scale.shape[-1]

    @property
    def growth(self) -> int:
        """The channels that the layer adds."""
        return self.kernel2.shape[-1]


Group = tuple[LayerParams, ...]


def split_layers(layers: Sequence[LayerParams], *, one_by_one: bool) -> list[Group]:
    """Return the layers in groups, in order; each of its own if `one_by_one`.

    A group adds at most half as many channels as the block's input has, so that no layer reads half again its own.
    """
    size = min(MAX_SIZE, layers[0].num_inputs // (2 * layers[0].growth))
    size = size if size >= MIN_SIZE and not one_by_one else 1
    return [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]


def stack_layers(group: Group) -> tuple[LayerParams, np.ndarray]:
    """Return the parameters of n layers as one stack [n, ...], as wide as the last one's, and each's own inputs [n]."""

    def stack(*leaves):
        return lax.concatenate([lax.expand_dims(_fill_up(leaf, leaves[-1].shape), (0,)) for leaf in leaves], 0)

    return jax.tree.map(stack, *group), np.array([layer.num_inputs for layer in group], np.int32)


def unstack_layers(stack: LayerParams, group: Group) -> list[LayerParams]:
    """Return each layer's own share of a stack of gradients; kernels may come in parts [n, parts, ...] to add up."""

    def take(i, stacked, leaf):
        parts = stacked.shape[1 : stacked.ndim - leaf.ndim]
        own = lax.slice(stacked, (i,) + (0,) * (stacked.ndim - 1), (i + 1, *parts, *leaf.shape))
        return lax.reduce_sum(lax.reshape(own, (math.prod(parts), *leaf.shape)), (0,))

    return [jax.tree.map(lambda *leaves, i=i: take(i, *leaves), stack, layer) for i, layer in enumerate(group)]


def loop_layers(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, inputs: PyTree, *, reverse: bool = False
) -> tuple[PyTree, PyTree]:
    """Do what `lax.scan` does; a single layer without a loop, for XLA to know its place."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return lax.scan(function, carry, inputs, reverse=reverse)
    carry, output = function(carry, jax.tree.map(_only_row, inputs))
    return carry, jax.tree.map(lambda leaf: lax.expand_dims(leaf, (0,)), output)


def _only_row(x):
    """x [1, ...] without its first axis; of a numpy array still a number known now."""
    return x[0] if isinstance(x, np.ndarray) else lax.squeeze(x, (0,))


def _fill_up(x, shape):
    """Put zeros at the ends of x, up to this shape."""
    if x.shape == shape:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, full - own, 0) for own, full in zip(x.shape, shape, strict=True)])
