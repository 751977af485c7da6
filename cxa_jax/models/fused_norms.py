"""Batch norm and ReLU, cut into pieces that others can put together, whose gradients XLA:CPU computes fast.

Every operation is the same function as its Flax counterpart and keeps only its inputs, or its output, for the backward
pass. First-order gradients only. All of them are sums, products and slices over [B, H, W, C], so that a batch sharded
over devices stays sharded and batch moments become global ones.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cxa_jax.models.tracing import traced_once

PIXELS = (0, 1, 2)  # the axes B, H, W of [B, H, W, C]


class Moments(NamedTuple):
    """Per-channel mean [C] and biased variance [C], float32 or wider."""

    mean: jax.Array
    var: jax.Array


class Affine(NamedTuple):
    """Per-channel scale [C] and bias [C] of a batch norm."""

    scale: jax.Array
    bias: jax.Array


def first_channels(moments: Moments, num_channels: int) -> Moments:
    """Return the moments of the first channels alone."""
    return Moments(*(lax.slice_in_dim(moment, 0, num_channels) for moment in moments))


# ---- cut in two: the moments, and the normalisation that is given them ----


@jax.custom_vjp
def compute_moments(x: jax.Array) -> Moments:
    """Compute mean and E[x^2] - mean^2, clipped at 0, over all pixels of [B, H, W, C]: Flax' fast variance."""
    x = _widen(x)
    mean = _mean(x)
    return Moments(mean, _relu(lax.sub(_mean(lax.square(x)), lax.square(mean))))


def moments_gradient(x: jax.Array, moments: Moments, g: Moments) -> jax.Array:
    """Return what the moments' gradients `g` add to the gradient of x: (g_mean + 2 (x - mean) g_var) / pixels."""
    num_pixels = math.prod(x.shape[:3])
    g_mean, g_var = g.mean / num_pixels, _unless_clipped(g.var, moments) * (2 / num_pixels)
    return _affine(_widen(x), moments.mean, g_var, g_mean).astype(x.dtype)


def _unless_clipped(g_var, moments):
    """What goes through the variances, 0 where they were clipped."""
    return lax.select(moments.var > 0, g_var, jnp.zeros_like(g_var))


def _compute_moments_forward(x):
    moments = compute_moments(x)
    return moments, (x, moments)


compute_moments.defvjp(_compute_moments_forward, lambda saved, g: (moments_gradient(*saved, g),))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, moments: Moments, affine: Affine, epsilon: float) -> jax.Array:
    """Compute (x - mean) / sqrt(var + epsilon) * scale + bias of [B, H, W, C], in float32, stored as x is."""
    return _normalize(_widen(x), moments, affine, epsilon).astype(x.dtype)


def _normalize_backward(epsilon, saved, g):
    x, moments, affine = saved
    inv_std = lax.rsqrt(moments.var + epsilon)
    wide, g, mean, inv_std, scale = _same_type(_widen(x), _widen(g), moments.mean, inv_std, affine.scale)
    slope = lax.mul(inv_std, scale)
    g_bias = lax.reduce_sum(g, PIXELS)
    g_slope = lax.reduce_sum(lax.mul(g, lax.sub(wide, _along(mean, x))), PIXELS)
    g_moments = Moments(lax.mul(-slope, g_bias), lax.mul(lax.mul(-0.5 * slope, lax.square(inv_std)), g_slope))
    return lax.mul(g, _along(slope, x)).astype(x.dtype), g_moments, Affine(lax.mul(inv_std, g_slope), g_bias)


normalize.defvjp(lambda *args: (normalize(*args), args[:3]), _normalize_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_relu(x: jax.Array, moments: Moments, affine: Affine, epsilon: float) -> jax.Array:
    """Compute relu((x - mean) / sqrt(var + epsilon) * scale + bias) of [B, H, W, C], in float32, stored as x is."""
    return _relu(_normalize(_widen(x), moments, affine, epsilon)).astype(x.dtype)


def undo_normalize_relu(epsilon, saved, g):
    """Return the gradients of x, moments and affine from those three and that of the output."""
    x, moments, affine = saved
    g = _widen(g)
    g = lax.select(_normalize(_widen(x), moments, affine, epsilon) > 0, g, jnp.zeros_like(g))
    return _normalize_backward(epsilon, saved, g)


normalize_relu.defvjp(lambda *args: (normalize_relu(*args), args[:3]), undo_normalize_relu)


# ---- cut elsewhere: standardised once, by whoever wrote the channels, scaled by each reader ----


def standardize(x: jax.Array, moments: Moments, epsilon: float) -> jax.Array:
    """Compute (x - mean) / sqrt(var + epsilon) of [B, H, W, C], in float32, stored as x is."""
    wide, mean, inv_std = _same_type(_widen(x), moments.mean, lax.rsqrt(moments.var + epsilon))
    return lax.mul(lax.sub(wide, _along(mean, x)), _along(inv_std, x)).astype(x.dtype)


@partial(traced_once, static_argnames="epsilon")
def undo_standardize(
    standardized: jax.Array, moments: Moments, epsilon: float, g: jax.Array, sums: Affine
) -> jax.Array:
    """Return the gradient of x, that through its own moments included, from that of `standardize(x)`.

    Args:
      standardized: what `standardize` made of x, [B, H, W, C].
      moments: the batch moments of x.
      epsilon: added to the variances.
      g: gradient of `standardized`.
      sums: over all pixels, of g * standardized as `scale` and of g as `bias`, [C].
    """
    inv_std = lax.rsqrt(moments.var + epsilon)
    share = -inv_std / math.prod(g.shape[:3])
    slope, shift = _unless_clipped(share * sums.scale, moments), share * sums.bias
    through_moments = _scale_and_shift(standardized, Affine(slope, shift))
    g, inv_std, through_moments = _same_type(_widen(g), inv_std, through_moments)
    return lax.add(lax.mul(g, _along(inv_std, g)), through_moments).astype(standardized.dtype)


def affine_relu(x: jax.Array, affine: Affine) -> jax.Array:
    """Compute relu(scale x + bias) of [B, H, W, C], in float32, stored as x is; for use under a custom gradient."""
    return _relu(_scale_and_shift(x, affine)).astype(x.dtype)


def undo_affine_relu(saved, g):
    """Return the gradients of affine_relu's x and affine from those two and that of the output."""
    x, affine = saved
    wide, g, scale = _same_type(_widen(x), _widen(g), affine.scale)
    g = lax.select(_scale_and_shift(x, affine) > 0, g, jnp.zeros_like(g))
    g_affine = Affine(lax.reduce_sum(lax.mul(g, wide), PIXELS), lax.reduce_sum(g, PIXELS))
    return lax.mul(g, _along(scale, g)).astype(x.dtype), g_affine


@jax.custom_vjp
def add_relu(x: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Compute relu(x + shortcut); only the sum's sign is needed for the gradient, and the output has it."""
    return jax.nn.relu(x + shortcut)


add_relu.defvjp(lambda *args: (add_relu(*args),) * 2, lambda out, g: (jnp.where(out > 0, g, 0),) * 2)


@partial(traced_once, static_argnames="epsilon")
def fold_batch_norm(moments: Moments, affine: Affine, epsilon: float) -> Affine:
    """Return the one scale and bias that a batch norm with fixed moments amounts to."""
    mean, inv_std, scale, bias = _same_type(moments.mean, lax.rsqrt(moments.var + epsilon), *affine)
    scale = lax.mul(scale, inv_std)
    return Affine(scale, lax.sub(bias, lax.mul(mean, scale)))


def apply_affine(x: jax.Array, affine: Affine, *, relu: bool = True) -> jax.Array:
    """Compute scale x + bias of [B, H, W, C], and its ReLU if asked, in float32, stored as x is."""
    y = _scale_and_shift(x, affine)
    return (jax.nn.relu(y) if relu else y).astype(x.dtype)


def _normalize(x, moments, affine, epsilon):
    slope = lax.rsqrt(moments.var + epsilon) * affine.scale
    return _affine(x, moments.mean, slope, affine.bias)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# A DenseNet's step has tens of thousands of operations, and tracing takes time for each. So what comes up hundreds of
# times is said in lax: jax.numpy takes three operations to lay a vector along an axis, and a traced call for each sum.
def _affine(x, mean, slope, bias):
    """Compute (x - mean) slope + bias of [B, H, W, C]."""
    x, mean, slope, bias = _same_type(x, mean, slope, bias)
    return lax.add(lax.mul(lax.sub(x, _along(mean, x)), _along(slope, x)), _along(bias, x))


def _same_type(*arrays):
    """The arrays in the widest of their types, which lax asks for: with JAX_ENABLE_X64 parameters are float64."""
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def _mean(x):
    return lax.reduce_sum(x, PIXELS) / math.prod(x.shape[:3])


def _scale_and_shift(x, affine):
    """Compute scale x + bias of [B, H, W, C]."""
    x, scale, bias = _same_type(_widen(x), *affine)
    return lax.add(lax.mul(x, _along(scale, x)), _along(bias, x))


def _along(v, x):
    """v [C] for each pixel of x [B, H, W, C]."""
    return lax.broadcast_in_dim(v, x.shape, (3,))


def _relu(x):
    """max(x, 0), for use under a custom gradient: its own is one half at 0."""
    return lax.max(x, jnp.zeros_like(x))
