"""Batch norm and ReLU undone on a GPU: the two sums over pixels as one kernel, read once and at the memory's speed.

XLA:GPU sums the pixels of [B, H, W, C] column by column, some times slower than memory allows where C is small and B
large, and keeps the mask of the ReLU in memory for whoever else wants it. A program here takes every so many tiles,
adds them up in registers, and the programs' sums are added at the end, always in the same order.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cxa_jax.models import fused_norms
from cxa_jax.models.fused_norms import Affine, Moments
from cxa_jax.models.kernel_tiles import choose_rows, count_own, interpret

# As measured on an H200, of eight choices (docs/performance.md).
TILE_SIZE = 4096  # numbers in a tile
MAX_CHANNELS = 128  # of them a row
NUM_PROGRAMS = 528  # about: four for each multiprocessor
COMPILER = triton.CompilerParams(num_warps=4, num_stages=3)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_relu(x: jax.Array, moments: Moments, affine: Affine, epsilon: float) -> jax.Array:
    """The function of this name in fused_norms.py, with its sums over pixels in the backward pass by the kernel."""
    return fused_norms.normalize_relu(x, moments, affine, epsilon)


def _undo_normalize_relu(epsilon, saved, g):
    x, moments, affine = saved
    g_moments, g_affine = undo_norm(x, moments, affine, epsilon, g)
    return undo_slope(x, moments, affine, epsilon, g).astype(x.dtype), g_moments, g_affine


normalize_relu.defvjp(lambda *args: (normalize_relu(*args), args[:3]), _undo_normalize_relu)


def undo_slope(x: jax.Array, moments: Moments, affine: Affine, epsilon: float, g: jax.Array) -> jax.Array:
    """Return x's gradient, moments held fixed, from relu(N(x))'s: slope g where N(x) > 0, in the moments' type."""
    slope = lax.rsqrt(moments.var + epsilon) * affine.scale
    return jnp.where(fused_norms.normalize(x, moments, affine, epsilon) > 0, g, 0).astype(slope.dtype) * slope


def undo_norm(x: jax.Array, moments: Moments, affine: Affine, epsilon: float, g: jax.Array) -> tuple[Moments, Affine]:
    """Return the gradients of moments and affine from relu(N(x))'s gradient g; x and g are [B, H, W, C]."""
    g_bias, g_slope = _sum_gradients(x, g, moments, affine, epsilon)
    inv_std = lax.rsqrt(moments.var + epsilon)
    slope = inv_std * affine.scale
    g_moments = Moments(-slope * g_bias, -0.5 * slope * jnp.square(inv_std) * g_slope)
    return g_moments, Affine(inv_std * g_slope, g_bias)


def _stack(moments: Moments, affine: Affine, epsilon: float) -> jax.Array:
    """Return mean, slope and bias [3, C]: N(x) = (x - mean) slope + bias, in this order also in the kernels.

    Written slope x + shift it would be another number in the last digit, and a ReLU here and there would open that is
    closed elsewhere in the graph.
    """
    return jnp.stack([moments.mean, lax.rsqrt(moments.var + epsilon) * affine.scale, affine.bias])


def _sum_gradients(x, g, moments, affine, epsilon):
    """Sums over pixels of g and of g (x - mean) where N(x) > 0, [2, C]."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    num_channels = math.gcd(x.shape[1], MAX_CHANNELS)
    num_steps, rows = x.shape[1] // num_channels, choose_rows(x.shape[0], TILE_SIZE // num_channels)
    num_programs = min(x.shape[0] // rows, max(1, NUM_PROGRAMS // num_steps))
    sums = pl.pallas_call(
        partial(_kernel, rows=rows, num_channels=num_channels, num_programs=num_programs),
        out_shape=jax.ShapeDtypeStruct((num_programs, 2, x.shape[1]), moments.mean.dtype),
        grid=(num_programs, num_steps),
        compiler_params=COMPILER,
        interpret=interpret(),
        name="norm_sums",
    )(x, g, _stack(moments, affine, epsilon))
    return sums.sum(0)


def _kernel(x_ref, g_ref, affine_ref, sums_ref, *, rows, num_channels, num_programs):
    program, channels = pl.program_id(0), pl.ds(pl.program_id(1) * num_channels, num_channels)
    mean, slope, bias = (affine_ref[i, channels][None] for i in range(3))
    wide = sums_ref.dtype

    def add(i, sums):
        pixels = pl.ds((program + i * num_programs) * rows, rows)
        centred = x_ref[pixels, channels].astype(wide) - mean
        g = jnp.where(centred * slope + bias > 0, g_ref[pixels, channels].astype(wide), 0)
        return sums[0] + g, sums[1] + g * centred

    zeros = jnp.zeros((rows, num_channels), wide)
    sums = lax.fori_loop(0, count_own(x_ref.shape[0] // rows, program, num_programs), add, (zeros, zeros))
    sums_ref[program, 0, channels], sums_ref[program, 1, channels] = (jnp.sum(x, axis=0) for x in sums)
