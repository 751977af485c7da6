"""Convolutions whose compiled gradients are slow or hungry on XLA:CPU, written so that they are not.

Every operation is the same function as lax' own and keeps only its inputs for the backward pass. First-order gradients
only. A product that sums over pixels is written on two-dimensional views [B*H*W, C]: XLA:CPU then reads the left
operand as it lies, and copies it transposed when the sum runs over three separate axes.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
NHWC = ("NHWC", "HWIO", "NHWC")


def not_before(g: jax.Array, x: jax.Array) -> jax.Array:
    """Return x [B, H, W, C], but let what is made of it wait for the gradient g [B, h, w, D].

    XLA:CPU drops optimisation barriers, merges what is computed twice, and computes as early as it can and then holds
    whatever does not depend on the backward pass: all that recomputing was to save. So x is made to depend on it, each
    image on its own gradient, so that nothing crosses between devices.
    """
    return x + 0 * g[:, :1, :1, :1].astype(x.dtype)


def pixel_gram(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sum a^T b over pixels: [B, H, W, C], [B, H, W, D] -> [C, D], accumulated and returned as `dtype`."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def device_grams(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return `pixel_gram` in parts [N, C, D] whose sum it is, N the most of all devices that divide the batch.

    In a loop a sum over devices would be exchanged in every turn; parts are added up behind it, all at once. If the
    devices that share the batch are a divisor of N, as those of `create_mesh` are, no part lies on two of them.
    """
    num_parts = _count_parts(a)
    a, b = a.reshape(num_parts, -1, a.shape[-1]), b.reshape(num_parts, -1, b.shape[-1])
    return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)


@jax.custom_vjp
def conv_1x1(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with [1, 1, C, D]: one matrix product, and two in the backward pass."""
    return _matmul(x, _matrix(kernel))


def undo_conv_1x1(saved, g, gram=pixel_gram):
    """Return the gradients of x and kernel, from these two and that of the output; the latter as `gram` sums it."""
    x, kernel = saved
    g_kernel = gram(x, g, kernel.dtype)
    return _matmul(g, _matrix(kernel).T), g_kernel.reshape(*g_kernel.shape[:-2], *kernel.shape)


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


def undo_conv_3x3(saved, g, gram=pixel_gram):
    """Return the gradients of x and kernel, from these two and that of the output; the latter as `gram` sums it."""
    x, kernel = saved
    num_out = g.shape[-1]
    shifts = _shifts(g)
    g_x = _matmul(shifts, kernel.transpose(0, 1, 3, 2).reshape(9 * num_out, -1))
    g_kernel = gram(x, shifts, kernel.dtype)
    return g_x, jnp.moveaxis(g_kernel.reshape(*g_kernel.shape[:-1], 3, 3, num_out), -4, -2)


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


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv_windows(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], dilation: Pair = (1, 1)
) -> jax.Array:
    """Convolve [B, H, W, C] with [kh, kw, C, D]: the gradient of each kernel cell is one product over pixels.

    The output at p is sum_d x[s p + r d - low] kernel[d] with strides s, dilation r and low padding, so the gradient of
    kernel[d] is sum_p x[s p + r d - low]^T g[p]: a strided view of x against g, no larger than either.
    """
    return _convolve(x, kernel, strides, padding, dilation)


def _conv_windows_backward(strides, padding, dilation, saved, g):
    x, kernel = saved
    _, undo = jax.vjp(lambda x: _convolve(x, kernel, strides, padding, dilation), x)
    padded = jnp.pad(not_before(g, x), ((0, 0), *padding, (0, 0)))

    def gram(i, j):
        return pixel_gram(_strided(padded, (i, j), g.shape[1:3], strides), g, kernel.dtype)

    rows, cols = ([step * i for i in range(n)] for n, step in zip(kernel.shape[:2], dilation, strict=True))
    grams = [[gram(i, j) for j in cols] for i in rows]
    return undo(g)[0], jnp.stack([jnp.stack(row) for row in grams])


conv_windows.defvjp(lambda *args: (conv_windows(*args), args[:2]), _conv_windows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_images(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair]) -> jax.Array:
    """Convolve [B, H, W, C], C a few, with [kh, kw, C, D]: the gradient of the kernel is one product for each image.

    It is that of the windows [h * w, kh kw C] and the output's gradient [h * w, D]. Of one image they stay in a
    processor's caches; those of a batch do not, and the library's gradient takes five times as long.
    """
    return _convolve(x, kernel, strides, padding)


def _conv_images_backward(strides, padding, saved, g):
    x, kernel = saved
    _, undo = jax.vjp(lambda x: _convolve(x, kernel, strides, padding), x)
    num_parts = _count_parts(x)  # each device goes through its own images
    rows, cols = (
        [slice(i, i + (n - 1) * stride + 1, stride) for i in range(window)]
        for n, stride, window in zip(g.shape[1:3], strides, kernel.shape[:2], strict=True)
    )

    def add(total, images):
        x, g = images
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        x = jnp.concatenate([x[:, :, own] for own in cols], axis=-1)
        windows = jnp.concatenate([x[:, own] for own in rows], axis=-1)
        return total + device_grams(windows, g, kernel.dtype), None

    turns = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(num_parts, -1, *a.shape[1:]), 1, 0), (x, g))
    zeros = jnp.zeros((num_parts, math.prod(kernel.shape[:3]), kernel.shape[3]), kernel.dtype)
    return undo(g)[0], lax.scan(add, zeros, turns)[0].sum(0).reshape(kernel.shape)


conv_images.defvjp(lambda *args: (conv_images(*args), args[:2]), _conv_images_backward)


def _convolve(x, kernel, strides, padding, dilation=(1, 1)):
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC)


def _count_parts(x):
    """The most of all devices that divide the batch of x: its sums are kept in so many parts, see `device_grams`."""
    return math.gcd(len(x), jax.device_count())


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
