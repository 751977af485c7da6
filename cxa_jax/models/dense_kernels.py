"""The 1x1 half of a dense layer as two GPU kernels, forward and backward, that touch every feature as seldom as can be.

A GPU trains DenseNet as fast as it moves feature maps. XLA calls a library for the product y = relu(N) K, and what a
library is given must lie in memory: for layer l, with all c_l channels before it, the normalised copy is written and
read again, the gradient is written before ReLU and norm are undone, and each sum over pixels is one more reading. In
units of [B, H, W, c_l] that is three passes forward and nine backward. Here it is one and three, for whatever is
elementwise in the features happens while a tile is in registers:

  forward   reads S, writes y and each tile's sums of y and y^2, which become y's batch moments;
  backward  reads S, the gradient g of y and the block's gradient buffer G; for its tile of S it computes relu(N)
            again, adds scale g K^T to G in place where the ReLU was open, and keeps in registers what it sums over
            pixels: the kernel's gradient relu(N)^T g, and the norm's.

S are the features as fused_dense_block.py stores them, standardised, and N = scale S + bias, in float32. Channels are
taken in steps of CHANNELS; the last step may reach past c_l into channels that are not the layer's: their scale, bias
and rows of K are zero, so they add nothing and their G is written back as it was.

The 3x3 half is the GPU's own library's; `undo_growth` puts the rest of its backward pass together.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cxa_jax.models import norm_kernel
from cxa_jax.models.fused_convolutions import convolve_3x3
from cxa_jax.models.fused_norms import Affine, Moments, moments_gradient
from cxa_jax.models.kernel_tiles import choose_rows, count_own, fills_tiles, interpret

CHANNELS = 64  # of S in a tile; half of it is the growth of a layer
# As measured in bfloat16 on an H200: among the fastest of 28 choices forward and 41 backward (docs/performance.md).
FORWARD_ROWS, FORWARD_COMPILER = 128, triton.CompilerParams(num_warps=4, num_stages=3)
BACKWARD_ROWS, BACKWARD_COMPILER = 32, triton.CompilerParams(num_warps=4, num_stages=3)
NUM_PROGRAMS = 528  # of the backward kernel, about: four for each multiprocessor


def takes(shape: tuple[int, ...]) -> bool:
    """Return whether the kernels take features of this shape [B, H, W, C]: pixels and channels fill whole tiles."""
    return fills_tiles(shape) and shape[3] % (CHANNELS // 2) == 0


def bottleneck(features: jax.Array, norm: Affine, kernel: jax.Array) -> tuple[jax.Array, Moments]:
    """Compute y = relu(N) K and y's batch moments.

    Args:
      features: [B, H, W, C], whose first c channels are S.
      norm: scale and bias, [c].
      kernel: K [1, 1, c, D].

    Returns:
      y [B, H, W, D] in the type of the features, and its moments [D].
    """
    pixels = features.reshape(-1, features.shape[-1])
    affine, matrix = _fill_steps(norm, kernel, features.dtype)
    rows, num_out = choose_rows(pixels.shape[0], FORWARD_ROWS), kernel.shape[3]
    num_tiles = pixels.shape[0] // rows
    y, sums = pl.pallas_call(
        partial(_bottleneck_kernel, rows=rows),
        out_shape=(
            jax.ShapeDtypeStruct((pixels.shape[0], num_out), features.dtype),
            jax.ShapeDtypeStruct((num_tiles, 2, num_out), affine.dtype),
        ),
        grid=(num_tiles,),
        compiler_params=FORWARD_COMPILER,
        interpret=interpret(),
        name="dense_bottleneck",
    )(pixels, affine, matrix)
    mean, square = sums.sum(0) / pixels.shape[0]
    return y.reshape(*features.shape[:3], num_out), Moments(mean, jnp.maximum(square - jnp.square(mean), 0.0))


def _bottleneck_kernel(x_ref, affine_ref, matrix_ref, y_ref, sums_ref, *, rows):
    tile, wide = pl.program_id(0), sums_ref.dtype
    pixels, (num_in, num_out) = pl.ds(tile * rows, rows), matrix_ref.shape

    def add(i, y):
        channels = pl.ds(i * CHANNELS, CHANNELS)
        scale, bias = (affine_ref[i, channels][None] for i in range(2))
        a = jnp.maximum(x_ref[pixels, channels].astype(wide) * scale + bias, 0)
        return y + triton.dot(a.astype(x_ref.dtype), matrix_ref[channels, :])

    y = lax.fori_loop(0, num_in // CHANNELS, add, jnp.zeros((rows, num_out), wide)).astype(y_ref.dtype)
    y_ref[pixels, :] = y
    y = y.astype(wide)  # the moments are those of y as it is stored
    sums_ref[tile, 0, :] = jnp.sum(y, axis=0)
    sums_ref[tile, 1, :] = jnp.sum(y * y, axis=0)


def undo_bottleneck(
    features: jax.Array, g_features: jax.Array, norm: Affine, kernel: jax.Array, g: jax.Array
) -> tuple[jax.Array, Affine, jax.Array]:
    """Undo y = relu(N) K for the whole gradient g of y [B, H, W, D], that through y's moments included.

    Args:
      features, norm, kernel: as in `bottleneck`.
      g_features: the gradient buffer G, as large as the features.
      g: gradient of y.

    Returns:
      G with S's gradient added to the first c channels, and the gradients of norm and kernel.
    """
    pixels, g_pixels, g = (x.reshape(-1, x.shape[-1]) for x in (features, g_features, g))
    affine, matrix = _fill_steps(norm, kernel, features.dtype)
    rows, (size, num_out), wide = choose_rows(pixels.shape[0], BACKWARD_ROWS), matrix.shape, affine.dtype
    num_splits = min(pixels.shape[0] // rows, max(1, NUM_PROGRAMS * CHANNELS // size))
    g_pixels, sums, g_matrix = pl.pallas_call(
        partial(_undo_kernel, rows=rows, num_splits=num_splits),
        out_shape=(
            jax.ShapeDtypeStruct(g_pixels.shape, g_pixels.dtype),
            jax.ShapeDtypeStruct((num_splits, 2, size), wide),
            jax.ShapeDtypeStruct((num_splits, size, num_out), wide),
        ),
        grid=(size // CHANNELS * num_splits,),
        input_output_aliases={1: 0},
        compiler_params=BACKWARD_COMPILER,
        interpret=interpret(),
        name="dense_undo_bottleneck",
    )(pixels, g_pixels, g, affine, matrix)
    num_inputs = norm.scale.size
    g_bias, g_scale = sums.sum(0)[:, :num_inputs]
    g_kernel = g_matrix.sum(0)[:num_inputs].astype(kernel.dtype)[None, None]
    return g_pixels.reshape(features.shape), Affine(g_scale, g_bias), g_kernel


def _undo_kernel(x_ref, old_ref, g_ref, affine_ref, matrix_ref, new_ref, sums_ref, g_matrix_ref, *, rows, num_splits):
    # Neighbouring programs share their pixels, so that g is read from memory once and from the cache by the others.
    num_steps = matrix_ref.shape[0] // CHANNELS
    split, channels = pl.program_id(0) // num_steps, pl.ds(pl.program_id(0) % num_steps * CHANNELS, CHANNELS)
    (scale, bias), matrix = (affine_ref[i, channels][None] for i in range(2)), matrix_ref[channels, :]
    wide = sums_ref.dtype

    def add(i, sums):
        pixels = pl.ds((split + i * num_splits) * rows, rows)
        x, g_y = x_ref[pixels, channels].astype(wide), g_ref[pixels, :]
        a = x * scale + bias
        g = jnp.where(a > 0, triton.dot(g_y, matrix, trans_b=True), 0)
        new_ref[pixels, channels] = (old_ref[pixels, channels].astype(wide) + g * scale).astype(new_ref.dtype)
        a = jnp.maximum(a, 0).astype(x_ref.dtype)
        g_matrix = triton.dot(a, g_y, trans_a=True)
        return sums[0] + g, sums[1] + g * x, sums[2] + g_matrix

    zeros = jnp.zeros((rows, CHANNELS), wide)  # summed over its rows at the end alone
    num_tiles = count_own(x_ref.shape[0] // rows, split, num_splits)
    *sums, g_matrix = lax.fori_loop(0, num_tiles, add, (zeros, zeros, jnp.zeros(matrix.shape, wide)))
    sums_ref[split, 0, channels], sums_ref[split, 1, channels] = (jnp.sum(x, axis=0) for x in sums)
    g_matrix_ref[split, channels, :] = g_matrix


def _fill_steps(norm, kernel, dtype):
    """Scale and bias [2, c] and K [c, D], with zeros up to a whole number of steps."""
    missing = -norm.scale.size % CHANNELS
    affine = jnp.pad(jnp.stack(norm), ((0, 0), (0, missing)))
    return affine, jnp.pad(kernel[0, 0].astype(dtype), ((0, missing), (0, 0)))


def undo_growth(
    y: jax.Array,
    moments: Moments,
    norm: Affine,
    kernel: jax.Array,
    epsilon: float,
    g: jax.Array,
    g_moments: Moments,
) -> tuple[jax.Array, Affine, jax.Array]:
    """Undo o = conv_3x3(relu(N(y)), K) for the gradients g of o [B, H, W, 32] and g_moments of y's moments.

    Returns:
      The whole gradient of y, that through its moments included, and those of norm and kernel.
    """
    g_z, g_kernel = jax.vjp(convolve_3x3, norm_kernel.normalize_relu(y, moments, norm, epsilon), kernel)[1](g)
    g_own, g_norm = norm_kernel.undo_norm(y, moments, norm, epsilon, g_z)
    g_y = norm_kernel.undo_slope(y, moments, norm, epsilon, g_z)
    g_y += moments_gradient(y.astype(g_y.dtype), moments, jax.tree.map(jnp.add, g_moments, g_own))
    return g_y.astype(y.dtype), g_norm, g_kernel
