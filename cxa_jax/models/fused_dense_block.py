"""A whole dense block under one custom gradient: one feature buffer, one gradient buffer, shared batch moments.

Layer l of a dense block reads all channels before it, X_l = [x, o_1, ..., o_(l-1)], and adds 32 of its own,

    a_l = relu(N(X_l; norm1))   y_l = a_l K1   z_l = relu(N(y_l; norm2))   o_l = z_l * K2   (1x1, then 3x3).

Written down like that, every layer copies all channels into a new array, measures their batch moments again and keeps
the normalised copy for the backward pass: traffic and memory grow with the square of the layers. Three remarks help.

1. One buffer. X_l is the head X[..., :c_l] of the block's output X, so each layer writes its 32 channels into place.
2. Shared moments. The batch moments of a channel do not depend on who asks. They are computed once, when the channel
   is written, and every later norm of the block - and the norm after the block - uses the same numbers. (Scale and
   bias stay each norm's own.)
3. One gradient buffer. Treat N(X; mean, var) as a function of three arguments. With slope = scale / sqrt(var + eps)
   and g the gradient behind norm and ReLU, zero where the ReLU is,

       dX = slope g      dmean = -slope sum g      dvar = -slope / (2 (var + eps)) sum g (X - mean).

   Over the layers these add up: dX in one buffer G as large as X, dmean and dvar in two vectors. A channel is finished
   once all its readers have been undone, and only then do its moments pass on what they have gathered, once,

       G + (dmean + 2 (X - mean) dvar) / pixels,                                          (moments_gradient)

   instead of once for each reader. Layers are undone last to first, so channels c_l ... c_l + 32 are finished exactly
   when layer l is due, and the block's input when all are done. What comes from outside for X and its moments is
   simply the value that G, dmean and dvar start from.

Kept between the passes: X, its moments and the bottlenecks y_l (not even those with `recompute`); a_l and z_l are
elementwise in what is kept and are computed again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxa_jax.models import dense_kernels
from cxa_jax.models.fused_ops import (
    Affine,
    Moments,
    apply_affine,
    compute_moments,
    conv_1x1,
    conv_3x3,
    first_channels,
    fold_batch_norm,
    moments_gradient,
    normalize_relu,
    undo_conv_1x1,
    undo_conv_3x3,
    undo_normalize_relu,
)


class LayerParams(NamedTuple):
    """Parameters of one dense layer: norms, kernel1 [1, 1, c, 128], kernel2 [3, 3, 128, 32]."""

    norm1: Affine
    kernel1: jax.Array
    norm2: Affine
    kernel2: jax.Array


class LayerMoments(NamedTuple):
    """Moments of the two norms of one dense layer: [c] and [128] channels."""

    norm1: Moments
    norm2: Moments


class LayerOps(NamedTuple):
    """What a platform does in its own way: X_l -> y_l with y_l's moments, and the layer's two halves undone."""

    bottleneck: Callable
    undo_bottleneck: Callable
    undo_growth: Callable


def _bottleneck(features, moments, norm1, kernel1, epsilon):
    """The block's buffer, whose first channels are X_l -> y_l and its moments."""
    y = conv_1x1(normalize_relu(_first(features, moments), moments, norm1, epsilon), kernel1)
    return y, compute_moments(y)


def _undo_bottleneck(features, g_features, moments, norm1, kernel1, epsilon, g):
    """Add X_l's gradient to the buffer's first channels; return it, and the gradients of moments, norm1 and kernel1."""
    g_x, *others = _undo(undo_conv_1x1, _first(features, moments), moments, norm1, kernel1, epsilon, g)
    return _add_to_first(g_features, g_x), *others


def _undo_growth(y, moments, norm2, kernel2, epsilon, g, g_moments):
    """Gradients of y_l, whole, of norm2 and of kernel2 from those of o_l and of y_l's moments."""
    g_y, g_own, g_norm2, g_kernel2 = _undo(undo_conv_3x3, y, moments, norm2, kernel2, epsilon, g)
    return g_y + moments_gradient(y, moments, jax.tree.map(jnp.add, g_own, g_moments)), g_norm2, g_kernel2


XLA = LayerOps(_bottleneck, _undo_bottleneck, _undo_growth)
KERNELS = LayerOps(dense_kernels.bottleneck, dense_kernels.undo_bottleneck, dense_kernels.undo_growth)


def _choose(kernels, x):
    """The GPU's kernels, if they are asked for and take the shape."""
    return KERNELS if kernels and dense_kernels.takes(x.shape) else XLA


def _growth(y, moments, norm2, kernel2, epsilon):
    """y_l -> o_l."""
    return conv_3x3(normalize_relu(y, moments, norm2, epsilon), kernel2)


def _undo(undo_conv, x, moments, norm, kernel, epsilon, g):
    """Gradients of x, moments, norm and kernel behind norm, ReLU and convolution, whose input is computed again."""
    g, g_kernel = undo_conv((normalize_relu(x, moments, norm, epsilon), kernel), g)
    return *undo_normalize_relu(epsilon, (x, moments, norm), g), g_kernel


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dense_block(
    x: jax.Array, layers: tuple[LayerParams, ...], epsilon: float, recompute: bool = False, kernels: bool = False
) -> tuple[jax.Array, Moments, tuple[Moments, ...]]:
    """Apply a dense block in training mode: [B, H, W, C] -> [B, H, W, C + 32 * layers].

    Args:
      x: input [B, H, W, C].
      layers: one LayerParams a layer, in order; layer i reads the first C + 32 i channels.
      epsilon: added to every variance.
      recompute: compute the 1x1 convolutions again in the backward pass instead of keeping their outputs.
      kernels: on a GPU, the 1x1 halves of the layers by dense_kernels.py, where it takes the shape.

    Returns:
      The features, the batch moments of all their channels (the norm after the block needs them, and their gradient
      is part of it), and the moments of each layer's norm2. First-order gradients only.
    """
    features, moments, bottlenecks = _forward(x, layers, epsilon, kernels)
    return features, moments, tuple(m for _, m in bottlenecks)


def _forward(x, layers, epsilon, kernels):
    num_inputs, ends, ops = x.shape[-1], _ends(x, layers), _choose(kernels, x)
    features = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, ends[-1] - num_inputs)))
    moments = compute_moments(x)
    bottlenecks = []
    for layer, end in zip(layers, ends, strict=False):
        y, y_moments = ops.bottleneck(features, moments, layer.norm1, layer.kernel1, epsilon)
        new = _growth(y, y_moments, layer.norm2, layer.kernel2, epsilon)
        features = jax.lax.dynamic_update_slice_in_dim(features, new, end, axis=3)
        moments = jax.tree.map(lambda old, add: jnp.concatenate([old, add]), moments, compute_moments(new))
        bottlenecks.append((y, y_moments))
    if ops is KERNELS:  # XLA:GPU would merge the last layer's write with what reads it, and copy the buffer for it
        features = jax.lax.optimization_barrier(features)
    return features, moments, bottlenecks


def _dense_block_forward(x, layers, epsilon, recompute, kernels):
    features, moments, bottlenecks = _forward(x, layers, epsilon, kernels)
    y_moments = tuple(m for _, m in bottlenecks)
    kept = tuple(None if recompute else y for y, _ in bottlenecks)
    return (features, moments, y_moments), (features, moments, y_moments, kept, layers)


def _dense_block_backward(epsilon, recompute, kernels, saved, g):
    features, moments, y_moments, kept, layers = saved
    g_features, g_moments, g_y_moments = g
    num_inputs, ops = layers[0].kernel1.shape[2], _choose(kernels, features)
    g_layers = [None] * len(layers)
    start, end = features.shape[-1], features.shape[-1]
    for i in reversed(range(len(layers))):
        layer, start, end = layers[i], layers[i].kernel1.shape[2], start
        g_new = _finished(features, moments, g_features, g_moments, start, end)
        x_moments, own = first_channels(moments, start), y_moments[i]
        if recompute or ops is XLA:
            x_moments, own = _not_before(g_moments, x_moments), _not_before(g_moments, own)
        y = ops.bottleneck(features, x_moments, layer.norm1, layer.kernel1, epsilon)[0] if recompute else kept[i]
        g_y, g_norm2, g_kernel2 = ops.undo_growth(y, own, layer.norm2, layer.kernel2, epsilon, g_new, g_y_moments[i])
        g_features, g_shared, g_norm1, g_kernel1 = ops.undo_bottleneck(
            features, g_features, x_moments, layer.norm1, layer.kernel1, epsilon, g_y
        )
        g_moments = jax.tree.map(_add_to_first, g_moments, g_shared)
        g_layers[i] = LayerParams(g_norm1, g_kernel1, g_norm2, g_kernel2)
    return _finished(features, moments, g_features, g_moments, 0, num_inputs), tuple(g_layers)


dense_block.defvjp(_dense_block_forward, _dense_block_backward)


def _not_before(g_moments, moments):
    """Let what is normalised by `moments` wait for `g_moments`, so for the layers undone before.

    Without the tie XLA:CPU, which drops optimisation barriers before it orders the operations, computes the normalised
    activations of all layers as soon as it can, and holds them all: the memory that recomputing was to save.
    """
    return Moments(moments.mean + 0 * g_moments.mean[0], moments.var)


def _first(features, moments):
    """The channels of the buffer that have these moments."""
    return features[..., : moments.mean.size]


def _add_to_first(total, g):
    """Add g [..., c] to the first c channels of the buffer `total`."""
    return jax.lax.dynamic_update_slice_in_dim(total, total[..., : g.shape[-1]] + g, 0, axis=total.ndim - 1)


def _finished(features, moments, g_features, g_moments, start, end):
    """The whole gradient of channels start ... end, once all their readers are undone (remark 3)."""
    part = slice(start, end)
    own, g_own = (Moments(m.mean[part], m.var[part]) for m in (moments, g_moments))
    return g_features[..., part] + moments_gradient(features[..., part], own, g_own)


def _ends(x, layers):
    """Channels in the buffer before each layer, and after the last."""
    return [x.shape[-1]] + [layer.kernel1.shape[2] + layer.kernel2.shape[3] for layer in layers]


def dense_block_inference(
    x: jax.Array, layers: Sequence[LayerParams], moments: Sequence[LayerMoments], epsilon: float
) -> jax.Array:
    """Apply a dense block with fixed moments: norm2 is folded into kernel1, norm1 into one scale and bias."""
    ends = _ends(x, layers)
    features = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, ends[-1] - ends[0])))
    for layer, fixed, end in zip(layers, moments, ends, strict=False):
        norm1 = fold_batch_norm(fixed.norm1, layer.norm1, epsilon)
        norm2 = fold_batch_norm(fixed.norm2, layer.norm2, epsilon)
        y = conv_1x1(apply_affine(features[..., :end], norm1), layer.kernel1 * norm2.scale)
        y = jax.nn.relu(y + norm2.bias.astype(y.dtype))
        features = jax.lax.dynamic_update_slice_in_dim(features, conv_3x3(y, layer.kernel2), end, axis=3)
    return features
