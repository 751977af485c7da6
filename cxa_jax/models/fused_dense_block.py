"""A whole dense block under one custom gradient: features stored standardised, and one gradient buffer.

Layer l of a dense block reads all channels before it, X_l = [x, o_1, ..., o_(l-1)], and adds 32 of its own,

    a_l = relu(N(X_l; norm1))   y_l = a_l K1   z_l = relu(N(y_l; norm2))   o_l = z_l * K2   (1x1, then 3x3),

and behind the last one stands a norm and ReLU of all channels X. Written down like that, every layer copies all
channels into a new array, measures their batch moments again and keeps the normalised copy for the backward pass:
traffic and memory grow with the square of the layers. Three remarks help.

1. One buffer. X_l is the head X[..., :c_l] of the block's output X, so each layer writes its 32 channels into place.
2. Standardised once. The batch moments of a channel do not depend on who asks, and neither does
   S = (X - mean) / sqrt(var + eps); scale and bias alone are a norm's own. So it is S that the buffer holds: a channel
   is measured and standardised when it is written, and all that a norm has to do is N = scale S + bias.
3. One gradient buffer. With g the gradient behind norm and ReLU, zero where the ReLU is closed, a norm gives

       dS = scale g      dscale = sum g S      dbias = sum g                          (sums over pixels).

   Over the layers dS adds up in one buffer G as large as S. A channel is finished once all its readers have been
   undone, and only then its standardisation is undone, once instead of once for each reader:

       dX = (G - (sum G + S sum G S) / pixels) / sqrt(var + eps)                      (undo_standardize).

   These sums need no look at G: a reader adds scale dbias to the first and scale dscale to the second. Layers are
   undone last to first, so channels c_l ... c_l + 32 are finished exactly when layer l is due, and the block's input
   when all are done.

Kept between the passes: S, the moments and the bottlenecks y_l (not even those with `recompute`); a_l and z_l are
elementwise in what is kept and are computed again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxa_jax.models import dense_kernels
from cxa_jax.models.fused_convolutions import conv_1x1, conv_3x3, undo_conv_1x1, undo_conv_3x3
from cxa_jax.models.fused_norms import (
    Affine,
    Moments,
    affine_relu,
    apply_affine,
    compute_moments,
    fold_batch_norm,
    moments_gradient,
    normalize_relu,
    standardize,
    undo_affine_relu,
    undo_normalize_relu,
    undo_standardize,
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
    """What a platform does in its own way: S_l -> y_l with y_l's moments, and the layer's two halves undone."""

    bottleneck: Callable
    undo_bottleneck: Callable
    undo_growth: Callable


def _bottleneck(features, norm1, kernel1):
    """The block's buffer, whose first channels are S_l -> y_l and its moments."""
    y = conv_1x1(affine_relu(_first(features, norm1), norm1), kernel1)
    return y, compute_moments(y)


def _undo_bottleneck(features, g_features, norm1, kernel1, g):
    """Add S_l's gradient to the buffer's first channels; return it, and the gradients of norm1 and kernel1."""
    x = _first(features, norm1)
    g, g_kernel1 = undo_conv_1x1((affine_relu(x, norm1), kernel1), g)
    g, g_norm1 = undo_affine_relu((x, norm1), g)
    return _add_to_first(g_features, g), g_norm1, g_kernel1


def _undo_growth(y, moments, norm2, kernel2, epsilon, g, g_moments):
    """Gradients of y_l, whole, of norm2 and of kernel2 from those of o_l and of y_l's moments."""
    g, g_kernel2 = undo_conv_3x3((normalize_relu(y, moments, norm2, epsilon), kernel2), g)
    g_y, g_own, g_norm2 = undo_normalize_relu(epsilon, (y, moments, norm2), g)
    return g_y + moments_gradient(y, moments, jax.tree.map(jnp.add, g_own, g_moments)), g_norm2, g_kernel2


XLA = LayerOps(_bottleneck, _undo_bottleneck, _undo_growth)
KERNELS = LayerOps(dense_kernels.bottleneck, dense_kernels.undo_bottleneck, dense_kernels.undo_growth)


def _choose(kernels, x):
    """The GPU's kernels, if they are asked for and take the shape."""
    return KERNELS if kernels and dense_kernels.takes(x.shape) else XLA


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def dense_block(
    x: jax.Array,
    layers: tuple[LayerParams, ...],
    closing: Affine,
    epsilon: float,
    recompute: bool = False,
    kernels: bool = False,
) -> tuple[jax.Array, Moments, tuple[Moments, ...]]:
    """Apply a dense block, and the norm and ReLU behind it, in training mode: [B, H, W, C] -> [B, H, W, D].

    Args:
      x: input [B, H, W, C].
      layers: one LayerParams a layer, in order; layer i reads the first C + 32 i channels.
      closing: scale and bias of the norm behind the block, [D], D = C + 32 * layers.
      epsilon: added to every variance.
      recompute: compute the 1x1 convolutions again in the backward pass instead of keeping their outputs.
      kernels: on a GPU, the 1x1 halves of the layers by dense_kernels.py, where it takes the shape.

    Returns:
      relu(N(X; closing)), the batch moments of all channels of X [D], and the moments of each layer's norm2.
      First-order gradients only.
    """
    return _dense_block_forward(x, layers, closing, epsilon, recompute, kernels)[0]


def _forward(x, layers, epsilon, kernels):
    """S, the moments of the input and of each layer's channels, and each layer's y and its moments."""
    ends, ops = _ends(x, layers), _choose(kernels, x)
    moments, bottlenecks = [compute_moments(x)], []
    features = jnp.pad(standardize(x, moments[0], epsilon), ((0, 0), (0, 0), (0, 0), (0, ends[-1] - ends[0])))
    for layer, end in zip(layers, ends, strict=False):
        y, y_moments = ops.bottleneck(features, layer.norm1, layer.kernel1)
        new = conv_3x3(normalize_relu(y, y_moments, layer.norm2, epsilon), layer.kernel2)
        moments.append(compute_moments(new))
        new = standardize(new, moments[-1], epsilon)
        features = jax.lax.dynamic_update_slice_in_dim(features, new, end, axis=3)
        bottlenecks.append((y, y_moments))
    if ops is KERNELS:  # XLA:GPU would merge the last layer's write with what reads it, and copy the buffer for it
        features = jax.lax.optimization_barrier(features)
    return features, moments, bottlenecks


def _dense_block_forward(x, layers, closing, epsilon, recompute, kernels):
    features, moments, bottlenecks = _forward(x, layers, epsilon, kernels)
    y_moments = tuple(m for _, m in bottlenecks)
    kept = tuple(None if recompute else y for y, _ in bottlenecks)
    outputs = affine_relu(features, closing), _join(moments), y_moments
    return outputs, (features, moments, outputs[1], y_moments, kept, layers, closing)


def _dense_block_backward(epsilon, recompute, kernels, saved, g):
    features, moments, all_moments, y_moments, kept, layers, closing = saved
    g, g_moments, g_y_moments = g
    ops, g_layers, end = _choose(kernels, features), [None] * len(layers), features.shape[-1]
    g_features, g_closing = undo_affine_relu((features, closing), g)
    sums = _add_reader(_sums_behind(all_moments, epsilon, g_moments), closing, g_closing)
    for i in reversed(range(len(layers))):
        layer, start, x, y = layers[i], layers[i].norm1.scale.size, features, kept[i]
        g_new = _finished(features, moments[i + 1], epsilon, g_features, sums, slice(start, end))
        if ops is XLA:
            x, y = _not_before(sums, (x, y))
        if recompute:
            y = ops.bottleneck(x, _not_before(sums, layer.norm1), layer.kernel1)[0]
        g_y, g_norm2, g_kernel2 = ops.undo_growth(
            y, y_moments[i], layer.norm2, layer.kernel2, epsilon, g_new, g_y_moments[i]
        )
        g_features, g_norm1, g_kernel1 = ops.undo_bottleneck(x, g_features, layer.norm1, layer.kernel1, g_y)
        sums, end = _add_reader(sums, layer.norm1, g_norm1), start
        g_layers[i] = LayerParams(g_norm1, g_kernel1, g_norm2, g_kernel2)
    g_x = _finished(features, moments[0], epsilon, g_features, sums, slice(0, end))
    return g_x, tuple(g_layers), g_closing


dense_block.defvjp(_dense_block_forward, _dense_block_backward)


def _join(moments):
    """The moments of all channels.

    Without the barrier XLA takes a layer's share of them, for its running averages, by putting the parts together once
    more: two programs to compile for each layer.
    """
    return jax.lax.optimization_barrier(jax.tree.map(lambda *parts: jnp.concatenate(parts), *moments))


def _sums_behind(moments, epsilon, g):
    """The sums over pixels, of G S as scale and of G as bias, that gradients of X's moments amount to."""
    var = moments.var + epsilon
    return Affine(-2 * var * g.var, -jnp.sqrt(var) * g.mean)


def _add_reader(sums, norm, g_norm):
    """Add to the sums what a norm's reading adds to them (remark 3); it reads the first channels."""
    return jax.tree.map(lambda total, g: _add_to_first(total, (norm.scale * g).astype(total.dtype)), sums, g_norm)


def _not_before(sums, tree):
    """Let what is computed from these arrays wait for `sums`, so for the layers undone before.

    As `fused_convolutions.not_before`, but by one number that all devices hold: less code in each of the many readers.
    """
    return jax.tree.map(lambda x: x + (0 * sums.scale[0]).astype(x.dtype), tree)


def _first(features, norm):
    """The channels of the buffer that a norm reads."""
    return features[..., : norm.scale.size]


def _add_to_first(total, g):
    """Add g [..., c] to the first c channels of the buffer `total`."""
    return jax.lax.dynamic_update_slice_in_dim(total, total[..., : g.shape[-1]] + g, 0, axis=total.ndim - 1)


def _finished(features, moments, epsilon, g_features, sums, part):
    """The whole gradient of channels of X, once all their readers are undone (remark 3)."""
    own = jax.tree.map(lambda total: total[part], sums)
    return undo_standardize(features[..., part], moments, epsilon, g_features[..., part], own)


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
