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

Layers come in groups, each a stack that is looped over (fused_layer_groups.py): so what is said here of one layer's
arrays holds for the stack of a group's, with an axis [n] in front.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxa_jax.models import dense_kernels
from cxa_jax.models.fused_convolutions import (
    conv_1x1,
    conv_3x3,
    device_grams,
    undo_conv_1x1,
    undo_conv_3x3,
)
from cxa_jax.models.fused_layer_groups import LayerParams, loop_layers, split_layers, stack_layers, unstack_layers
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
from cxa_jax.models.tracing import traced_once


class LayerMoments(NamedTuple):
    """Moments of the two norms of one dense layer: [c] and [128] channels."""

    norm1: Moments
    norm2: Moments


class Computed(NamedTuple):
    """What a layer computed: its channels' moments [32], y [B, H, W, 128] or None, y's moments; or a stack of such."""

    moments: Moments
    y: jax.Array | None
    y_moments: Moments


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
    g, g_kernel1 = undo_conv_1x1((affine_relu(x, norm1), kernel1), g, device_grams)
    g, g_norm1 = undo_affine_relu((x, norm1), g)
    return _add_to_first(g_features, g), g_norm1, g_kernel1


@partial(traced_once, static_argnames="epsilon")
def _undo_growth(y, moments, norm2, kernel2, epsilon, g, g_moments):
    """Gradients of y_l, whole, of norm2 and of kernel2 from those of o_l and of y_l's moments."""
    g, g_kernel2 = undo_conv_3x3((normalize_relu(y, moments, norm2, epsilon), kernel2), g, device_grams)
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
    """S, the moments of the input, and what the layers of each group computed."""
    ops = _choose(kernels, x)
    moments, computed = compute_moments(x), []
    num_added = len(layers) * layers[0].growth
    features = jnp.pad(standardize(x, moments, epsilon), ((0, 0), (0, 0), (0, 0), (0, num_added)))
    for group in split_layers(layers, one_by_one=ops is KERNELS):
        features, own = loop_layers(partial(_apply_layer, ops, epsilon), features, stack_layers(group))
        computed.append(own)
    if ops is KERNELS:  # XLA:GPU would merge the last layer's write with what reads it, and copy the buffer for it
        features = jax.lax.optimization_barrier(features)
    return features, moments, computed


def _apply_layer(ops, epsilon, features, inputs):
    """Write one layer's channels, standardised, into the buffer."""
    layer, start = inputs
    y, y_moments = ops.bottleneck(features, layer.norm1, layer.kernel1)
    new, moments = _grow(y, y_moments, layer.norm2, layer.kernel2, epsilon)
    return jax.lax.dynamic_update_slice_in_dim(features, new, start, axis=3), Computed(moments, y, y_moments)


@partial(traced_once, static_argnames="epsilon")
def _grow(y, y_moments, norm2, kernel2, epsilon):
    """A layer's channels, standardised, and their moments."""
    new = conv_3x3(normalize_relu(y, y_moments, norm2, epsilon), kernel2)
    moments = compute_moments(new)
    return standardize(new, moments, epsilon), moments


def _dense_block_forward(x, layers, closing, epsilon, recompute, kernels):
    features, moments, computed = _forward(x, layers, epsilon, kernels)
    y_moments = [own.y_moments for own in computed]
    all_moments = _join([moments, *(jax.tree.map(jnp.ravel, own.moments) for own in computed)])
    outputs = affine_relu(features, closing), all_moments, tuple(m for group in y_moments for m in _rows(group))
    if recompute:
        computed = [own._replace(y=None) for own in computed]
    return outputs, (features, moments, all_moments, computed, layers, closing)


def _dense_block_backward(epsilon, recompute, kernels, saved, g):
    features, moments, all_moments, computed, layers, closing = saved
    g, g_moments, g_y_moments = g
    ops, g_layers, end = _choose(kernels, features), [], len(layers)
    g_features, g_closing = undo_affine_relu((features, closing), g)
    sums = _add_reader(_sums_behind(all_moments, epsilon, g_moments), closing, g_closing)
    groups = split_layers(layers, one_by_one=ops is KERNELS)
    for group, own in zip(reversed(groups), reversed(computed), strict=True):
        start = end - len(group)
        g_own = jax.tree.map(lambda *rows: jnp.stack(rows), *g_y_moments[start:end])
        # What all layers of the group read, cut out once, but not yet; the GPU's kernels find it themselves.
        readable = features if ops is KERNELS else _not_before(sums, _first(features, group[-1].norm1))
        undo = partial(_undo_layer, ops, epsilon, features, readable)
        inputs = *stack_layers(group), own, g_own
        (g_features, sums), stack = loop_layers(undo, (g_features, sums), inputs, reverse=True)
        g_layers, end = unstack_layers(stack, group) + g_layers, start
    g_x = _finished(features, moments, epsilon, g_features, sums, 0)
    return g_x, tuple(g_layers), g_closing


def _undo_layer(ops, epsilon, features, readable, carry, inputs):
    """Undo one layer: its share of the gradient buffer and of the sums, and its parameters' gradients."""
    (g_features, sums), (layer, start, own, g_y_moments) = carry, inputs
    g_new = _finished(features, own.moments, epsilon, g_features, sums, start)
    y = _not_before(sums, own.y) if ops is XLA else own.y
    if y is None:
        y = ops.bottleneck(readable, _not_before(sums, layer.norm1), layer.kernel1)[0]
    g_y, g_norm2, g_kernel2 = ops.undo_growth(y, own.y_moments, layer.norm2, layer.kernel2, epsilon, g_new, g_y_moments)
    g_features, g_norm1, g_kernel1 = ops.undo_bottleneck(readable, g_features, layer.norm1, layer.kernel1, g_y)
    return (g_features, _add_reader(sums, layer.norm1, g_norm1)), LayerParams(g_norm1, g_kernel1, g_norm2, g_kernel2)


dense_block.defvjp(_dense_block_forward, _dense_block_backward)


def _rows(stack):
    """The Moments of each row of Moments [n, c]."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(len(stack.mean))]


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
    return jax.lax.slice_in_dim(features, 0, norm.scale.size, axis=3)


def _add_to_first(total, g):
    """Add g [..., c] to the first c channels of the buffer `total`."""
    axis = total.ndim - 1
    first = jax.lax.slice_in_dim(total, 0, g.shape[-1], axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(total, jax.lax.add(first, g), 0, axis=axis)


def _finished(features, moments, epsilon, g_features, sums, start):
    """The whole gradient of the channels of X with these moments, once all their readers are undone (remark 3)."""

    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, start, moments.mean.size, axis=x.ndim - 1)

    return undo_standardize(cut(features), moments, epsilon, cut(g_features), jax.tree.map(cut, sums))


def _ends(x, layers):
    """Channels in the buffer before each layer, and after the last."""
    return [x.shape[-1]] + [layer.num_inputs + layer.growth for layer in layers]


def dense_block_inference(
    x: jax.Array, layers: Sequence[LayerParams], moments: Sequence[LayerMoments], epsilon: float
) -> jax.Array:
    """Apply a dense block with fixed moments: norm2 is folded into kernel1, norm1 into one scale and bias."""
    ends = _ends(x, layers)
    features = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, ends[-1] - ends[0])))
    for layer, fixed, end in zip(layers, moments, ends, strict=False):
        norm1 = fold_batch_norm(fixed.norm1, layer.norm1, epsilon)
        norm2 = fold_batch_norm(fixed.norm2, layer.norm2, epsilon)
        y = conv_1x1(apply_affine(_first(features, norm1), norm1), layer.kernel1 * norm2.scale)
        new = _grow_inference(y, norm2.bias, layer.kernel2)
        features = jax.lax.dynamic_update_slice_in_dim(features, new, end, axis=3)
    return features


@traced_once
def _grow_inference(y, bias, kernel2):
    return conv_3x3(jax.nn.relu(y + bias.astype(y.dtype)), kernel2)
