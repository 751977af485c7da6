"""Operations of DenseNet whose compiled gradients are slow or hungry on XLA:CPU, written so that they are not.

Every operation is the same function as its Flax counterpart and keeps only its inputs for the backward pass (the max
pool: one byte an output). First-order gradients only. All of them are sums, products and slices over [B, H, W, C], so
that a batch sharded over devices stays sharded and batch moments become global ones.

A product that sums over pixels is written on two-dimensional views [B*H*W, C]: XLA:CPU then reads the left operand as
it lies, and copies it transposed when the sum runs over three separate axes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PIXELS = (0, 1, 2)  # the axes B, H, W of [B, H, W, C]
WINDOW = [(i, j) for i in range(3) for j in range(3)]  # the cells of a 3x3 window, row by row


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
    return Moments(moments.mean[:num_channels], moments.var[:num_channels])


# ---- batch norm and ReLU, cut in two: the moments, and the normalisation that is given them ----


@jax.custom_vjp
def compute_moments(x: jax.Array) -> Moments:
    """Compute mean and E[x^2] - mean^2, clipped at 0, over all pixels of [B, H, W, C]: Flax' fast variance."""
    x = _widen(x)
    mean = x.mean(PIXELS)
    return Moments(mean, jnp.maximum(jnp.square(x).mean(PIXELS) - jnp.square(mean), 0.0))


def moments_gradient(x: jax.Array, moments: Moments, g: Moments) -> jax.Array:
    """Return what the moments' gradients `g` add to the gradient of x: (g_mean + 2 (x - mean) g_var) / pixels."""
    num_pixels = x.size // x.shape[-1]
    g_mean = g.mean / num_pixels
    g_var = jnp.where(moments.var > 0, g.var, 0.0) * (2 / num_pixels)  # no gradient where the variance was clipped
    return (_row(g_mean) + (_widen(x) - _row(moments.mean)) * _row(g_var)).astype(x.dtype)


def _compute_moments_forward(x):
    moments = compute_moments(x)
    return moments, (x, moments)


compute_moments.defvjp(_compute_moments_forward, lambda saved, g: (moments_gradient(*saved, g),))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_relu(x: jax.Array, moments: Moments, affine: Affine, epsilon: float) -> jax.Array:
    """Compute relu((x - mean) / sqrt(var + epsilon) * scale + bias) of [B, H, W, C], in float32, stored as x is."""
    return jax.nn.relu(_normalize(_widen(x), moments, affine, epsilon)).astype(x.dtype)


def _normalize_relu_backward(epsilon, saved, g):
    x, moments, affine = saved
    inv_std = lax.rsqrt(moments.var + epsilon)
    slope = inv_std * affine.scale
    g = jnp.where(_normalize(_widen(x), moments, affine, epsilon) > 0, _widen(g), 0.0)
    g_bias = g.sum(PIXELS)
    g_slope = (g * (_widen(x) - _row(moments.mean))).sum(PIXELS)
    g_moments = Moments(-slope * g_bias, -0.5 * slope * jnp.square(inv_std) * g_slope)
    return (g * _row(slope)).astype(x.dtype), g_moments, Affine(inv_std * g_slope, g_bias)


normalize_relu.defvjp(lambda *args: (normalize_relu(*args), args[:3]), _normalize_relu_backward)


def fold_batch_norm(moments: Moments, affine: Affine, epsilon: float) -> Affine:
    """Return the one scale and bias that a batch norm with fixed moments amounts to."""
    scale = affine.scale * lax.rsqrt(moments.var + epsilon)
    return Affine(scale, affine.bias - moments.mean * scale)


def affine_relu(x: jax.Array, affine: Affine) -> jax.Array:
    """Compute relu(scale x + bias) of [B, H, W, C], in float32, stored as x is."""
    return jax.nn.relu(_widen(x) * _row(affine.scale) + _row(affine.bias)).astype(x.dtype)


def _normalize(x, moments, affine, epsilon):
    slope = lax.rsqrt(moments.var + epsilon) * affine.scale
    return (x - _row(moments.mean)) * _row(slope) + _row(affine.bias)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(v):
    return v[None, None, None]


# ---- convolutions ----


@jax.custom_vjp
def conv_1x1(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with [1, 1, C, D]: one matrix product, and two in the backward pass."""
    return _matmul(x, kernel[0, 0])


def _conv_1x1_backward(saved, g):
    x, kernel = saved
    return _matmul(g, kernel[0, 0].T), _pixel_gram(x, g, kernel.dtype)[None, None]


conv_1x1.defvjp(lambda x, kernel: (conv_1x1(x, kernel), (x, kernel)), _conv_1x1_backward)


@jax.custom_vjp
def conv_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with [3, 3, C, D] at stride 1 and padding 1.

    The output at p is sum_d x[p + d - 1] kernel[d], so both gradients read the nine shifts S[q, d] = g[q - d + 1] of
    the output's gradient: that of x is sum_d S[q, d] kernel[d]^T, that of kernel[d] is sum_q x[q]^T S[q, d]. The shifts
    lie side by side as one matrix [B*H*W, 9 D], narrow because D is, and each gradient is one product with it.
    """
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv_3x3_backward(saved, g):
    x, kernel = saved
    _, height, width, num_out = g.shape
    padded = jnp.pad(g, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = jnp.concatenate([padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width] for i, j in WINDOW], axis=-1)
    g_x = _matmul(shifts, kernel.transpose(0, 1, 3, 2).reshape(9 * num_out, -1))
    g_kernel = _pixel_gram(x, shifts, kernel.dtype).reshape(-1, 3, 3, num_out).transpose(1, 2, 0, 3)
    return g_x, g_kernel


conv_3x3.defvjp(lambda x, kernel: (conv_3x3(x, kernel), (x, kernel)), _conv_3x3_backward)


def _matmul(x, matrix):
    """[B, H, W, C] times [C, D] -> [B, H, W, D]."""
    return lax.dot_general(x, matrix.astype(x.dtype), (((3,), (0,)), ((), ())))


def _pixel_gram(a, b, dtype):
    """Sum over pixels of a^T b: [B, H, W, C], [B, H, W, D] -> [C, D], accumulated and returned as `dtype`."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


# ---- pools ----


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 2, one pixel of -inf around: -> [B, ceil(H/2), ceil(W/2), C].

    The gradient of a window goes to its first maximum in row order, as XLA's select-and-scatter has it.
    """
    _, height, width, _ = x.shape
    return _max_pool_even(_pad_inf(x, (0, height % 2), (0, width % 2)))  # a line of -inf more never wins


@jax.custom_vjp
def _max_pool_even(x):
    return _max_and_cell(x)[0]


def _max_and_cell(x):
    """The maxima and, as uint8, the window's cell that holds each; H and W even."""
    _, height, width, _ = x.shape
    x = _pad_inf(x, (1, 0), (1, 0))
    views = [x[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for i, j in WINDOW]
    best, cell = views[0], jnp.zeros(views[0].shape, jnp.uint8)
    for k, view in enumerate(views[1:], start=1):
        cell = jnp.where(view > best, jnp.uint8(k), cell)
        best = jnp.maximum(best, view)
    return best, cell


def _pad_inf(x, rows, cols):
    return jnp.pad(x, ((0, 0), rows, cols, (0, 0)), constant_values=-jnp.inf)


def _max_pool_backward(cell, g):
    parts = [[jnp.where(cell == 3 * i + j, g, 0) for j in range(3)] for i in range(3)]
    return (_interleave([_interleave(row, axis=2) for row in parts], axis=1),)


def _interleave(parts, axis):
    """Lay the gradients of the window's first, middle and last cells along `axis` out on the input's grid.

    With one pixel of padding the window n covers inputs 2n - 1, 2n, 2n + 1: input 2n hears the middle of window n,
    input 2n + 1 the last of window n and the first of window n + 1.
    """
    first, middle, last = parts
    zero = jnp.zeros_like(lax.slice_in_dim(first, 0, 1, axis=axis))
    next_first = jnp.concatenate([lax.slice_in_dim(first, 1, None, axis=axis), zero], axis)
    both = jnp.stack([middle, last + next_first], axis + 1)
    return both.reshape(*first.shape[:axis], 2 * first.shape[axis], *first.shape[axis + 1 :])


_max_pool_even.defvjp(_max_and_cell, _max_pool_backward)


def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """Average [B, H, W, C] over 2x2 cells; an odd last row or column is dropped: -> [B, H//2, W//2, C]."""
    batch, height, width, channels = x.shape
    rows, cols = height // 2, width // 2
    return x[:, : 2 * rows, : 2 * cols].reshape(batch, rows, 2, cols, 2, channels).mean((2, 4))
