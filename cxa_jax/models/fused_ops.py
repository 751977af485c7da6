"""Operations of the backbones whose compiled gradients are slow or hungry on XLA:CPU, written so that they are not.

Every operation is the same function as its Flax counterpart and keeps only its inputs, or its output, for the backward
pass. First-order gradients only. All of them are sums, products and slices over [B, H, W, C], so
that a batch sharded over devices stays sharded and batch moments become global ones.

A product that sums over pixels is written on two-dimensional views [B*H*W, C]: XLA:CPU then reads the left operand as
it lies, and copies it transposed when the sum runs over three separate axes.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
PIXELS = (0, 1, 2)  # the axes B, H, W of [B, H, W, C]
NHWC = ("NHWC", "HWIO", "NHWC")


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


def not_before(g: jax.Array, x: jax.Array) -> jax.Array:
    """Return x [B, H, W, C], but let what is made of it wait for the gradient g [B, h, w, D].

    XLA:CPU drops optimisation barriers, merges what is computed twice, and computes as early as it can and then holds
    whatever does not depend on the backward pass: all that recomputing was to save. So x is made to depend on it, each
    image on its own gradient, so that nothing crosses between devices.
    """
    return x + 0 * g[:, :1, :1, :1].astype(x.dtype)


# ---- batch norm and ReLU, cut in two: the moments, and the normalisation that is given them ----


@jax.custom_vjp
def compute_moments(x: jax.Array) -> Moments:
    """Compute mean and E[x^2] - mean^2, clipped at 0, over all pixels of [B, H, W, C]: Flax' fast variance."""
    x = _widen(x)
    mean = _mean(x)
    return Moments(mean, _relu(lax.sub(_mean(lax.square(x)), lax.square(mean))))


def moments_gradient(x: jax.Array, moments: Moments, g: Moments) -> jax.Array:
    """Return what the moments' gradients `g` add to the gradient of x: (g_mean + 2 (x - mean) g_var) / pixels."""
    num_pixels = math.prod(x.shape[:3])
    g_mean = g.mean / num_pixels
    # no gradient where the variance was clipped
    g_var = lax.select(moments.var > 0, g.var, jnp.zeros_like(g.var)) * (2 / num_pixels)
    return _affine(_widen(x), moments.mean, g_var, g_mean).astype(x.dtype)


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


@jax.custom_vjp
def add_relu(x: jax.Array, shortcut: jax.Array) -> jax.Array:
    """Compute relu(x + shortcut); only the sum's sign is needed for the gradient, and the output has it."""
    return jax.nn.relu(x + shortcut)


add_relu.defvjp(lambda *args: (add_relu(*args),) * 2, lambda out, g: (jnp.where(out > 0, g, 0),) * 2)


def fold_batch_norm(moments: Moments, affine: Affine, epsilon: float) -> Affine:
    """Return the one scale and bias that a batch norm with fixed moments amounts to."""
    scale = affine.scale * lax.rsqrt(moments.var + epsilon)
    return Affine(scale, affine.bias - moments.mean * scale)


def apply_affine(x: jax.Array, affine: Affine, *, relu: bool = True) -> jax.Array:
    """Compute scale x + bias of [B, H, W, C], and its ReLU if asked, in float32, stored as x is."""
    y = _widen(x) * _along(affine.scale, x) + _along(affine.bias, x)
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


def _along(v, x):
    """v [C] for each pixel of x [B, H, W, C]."""
    return lax.broadcast_in_dim(v, x.shape, (3,))


def _relu(x):
    """max(x, 0), for use under a custom gradient: its own is one half at 0."""
    return lax.max(x, jnp.zeros_like(x))


# ---- convolutions ----


@jax.custom_vjp
def conv_1x1(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with [1, 1, C, D]: one matrix product, and two in the backward pass."""
    return _matmul(x, _matrix(kernel))


def undo_conv_1x1(saved, g):
    """Return the gradients of x and kernel from these two and that of the output."""
    x, kernel = saved
    return _matmul(g, _matrix(kernel).T), _pixel_gram(x, g, kernel.dtype).reshape(kernel.shape)


conv_1x1.defvjp(lambda x, kernel: (conv_1x1(x, kernel), (x, kernel)), undo_conv_1x1)


@jax.custom_vjp
def conv_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with [3, 3, C, D] at stride 1 and padding 1.

    The output at p is sum_d x[p + d - 1] kernel[d], so both gradients read the nine shifts S[q, d] = g[q - d + 1] of
    the output's gradient: that of x is sum_d S[q, d] kernel[d]^T, that of kernel[d] is sum_q x[q]^T S[q, d]. The shifts
    lie side by side as one matrix [B*H*W, 9 D], narrow because D is, and each gradient is one product with it.
    """
    return convolve_3x3(x, kernel)


def convolve_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute what `conv_3x3` does, with the library's gradients."""
    return _convolve(x, kernel.astype(x.dtype), (1, 1), "SAME")


def undo_conv_3x3(saved, g):
    """Return the gradients of x and kernel from these two and that of the output."""
    x, kernel = saved
    num_out = g.shape[-1]
    shifts = _shifts(g)
    g_x = _matmul(shifts, kernel.transpose(0, 1, 3, 2).reshape(9 * num_out, -1))
    g_kernel = _pixel_gram(x, shifts, kernel.dtype).reshape(-1, 3, 3, num_out).transpose(1, 2, 0, 3)
    return g_x, g_kernel


def _shifts(g):
    """[B, H, W, D] -> [B, H, W, 9 D], S of `conv_3x3`: the three shifts of columns, then the three of rows of those."""
    for axis in (2, 1):
        size = g.shape[axis]
        after = _pad(lax.slice_in_dim(g, 1, size, axis=axis), axis, (0, 1))
        before = _pad(lax.slice_in_dim(g, 0, size - 1, axis=axis), axis, (1, 0))
        g = jnp.concatenate([after, g, before], axis=-1)
    return g


def _pad(x, axis, zeros):
    """Put (before, after) zeros at the ends of one axis."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(*zeros, 0) if own == axis else (0, 0, 0) for own in range(x.ndim)])


conv_3x3.defvjp(lambda x, kernel: (conv_3x3(x, kernel), (x, kernel)), undo_conv_3x3)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_windows(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair]) -> jax.Array:
    """Convolve [B, H, W, C] with [kh, kw, C, D]: the gradient of each kernel cell is one product over pixels.

    The output at p is sum_d x[s p + d - low] kernel[d] with strides s and low padding, so the gradient of kernel[d] is
    sum_p x[s p + d - low]^T g[p]: a strided view of x against g, no larger than either.
    """
    return _convolve(x, kernel, strides, padding)


def _conv_windows_backward(strides, padding, saved, g):
    x, kernel = saved
    _, undo = jax.vjp(lambda x: _convolve(x, kernel, strides, padding), x)
    padded = jnp.pad(not_before(g, x), ((0, 0), *padding, (0, 0)))
    grams = [
        [_pixel_gram(_strided(padded, (i, j), g.shape[1:3], strides), g, kernel.dtype) for j in range(kernel.shape[1])]
        for i in range(kernel.shape[0])
    ]
    return undo(g)[0], jnp.stack([jnp.stack(row) for row in grams])


conv_windows.defvjp(lambda *args: (conv_windows(*args), args[:2]), _conv_windows_backward)


def _convolve(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def _strided(x, start, size, strides):
    """The cells start, start + strides, ... of [B, H, W, C]: `size` of them along H and W."""
    (i, j), (rows, cols), (down, right) = start, size, strides
    return x[:, i : i + (rows - 1) * down + 1 : down, j : j + (cols - 1) * right + 1 : right]


def _matrix(kernel):
    """[1, 1, C, D] -> [C, D]."""
    return kernel.reshape(kernel.shape[2:])


def _matmul(x, matrix):
    """[B, H, W, C] times [C, D] -> [B, H, W, D]."""
    return lax.dot_general(x, matrix.astype(x.dtype), (((3,), (0,)), ((), ())))


def _pixel_gram(a, b, dtype):
    """Sum over pixels of a^T b: [B, H, W, C], [B, H, W, D] -> [C, D], accumulated and returned as `dtype`."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
