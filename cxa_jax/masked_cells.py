"""Reductions over the cells of a map [B, h, w, C] of which a mask leaves some out; what poolings are made of."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

CELLS = (1, 2)


def to_positive(temperature: ArrayLike, dtype) -> Array:
    """Return the temperature in `dtype`; raise ValueError for a number that is not positive."""
    if isinstance(temperature, int | float) and not temperature > 0:  # a traced temperature cannot be checked
        raise ValueError(f"temperature must be positive, got {temperature}")
    return jnp.asarray(temperature, dtype)


def find_valid(features: Array, mask: Array | None) -> Array:
    """Return the mask as [B, h, w, 1], True where a cell counts; None counts all."""
    return jnp.ones((*features.shape[:3], 1), bool) if mask is None else mask.astype(bool)[..., None]


def count_valid(valid: Array, dtype) -> Array:
    """Return the number of valid cells of each row, [B, 1, 1, 1]; 1 for none, to divide by."""
    return jnp.maximum(jnp.sum(valid, axis=CELLS, keepdims=True), 1).astype(dtype)


def zero_if_empty(pooled: Array, valid: Array) -> Array:
    """Return pooled values [B, C], 0 in rows without a valid cell."""
    return jnp.where(jnp.any(valid, axis=CELLS), pooled, 0)


def _below_top(scores: Array, valid: Array) -> tuple[Array, Array]:
    """Return scores - top, 0 in masked cells, and top, the largest valid score (0 in an empty row)."""
    top = jnp.max(jax.lax.stop_gradient(scores), axis=CELLS, keepdims=True, initial=-jnp.inf, where=valid)
    top = jnp.where(jnp.isfinite(top), top, 0)
    # masked cells are kept out of exp, where they could overflow and turn a zero gradient into NaN
    return jnp.where(valid, scores - top, 0), top


def softmax(scores: Array, mask: Array | None, temperature: ArrayLike) -> Array:
    """Return softmax(scores / temperature) over the valid cells; zeros elsewhere and in empty rows."""
    valid = find_valid(scores, mask)
    # top is taken off before the division, which could overflow at a low temperature
    exp = jnp.where(valid, jnp.exp(_below_top(scores, valid)[0] / to_positive(temperature, scores.dtype)), 0)
    return exp / jnp.where(jnp.any(valid, axis=CELLS, keepdims=True), jnp.sum(exp, axis=CELLS, keepdims=True), 1)


def log_mean_exp(scores: Array, sharpness: Array, valid: Array) -> Array:
    """Return (1 / r) log mean exp(r scores), r = sharpness; their mean as r -> 0."""
    below, top = _below_top(scores, valid)
    exponents, count = sharpness * below, count_valid(valid, scores.dtype)
    flat = jnp.min(exponents, axis=CELLS, keepdims=True) > -1  # there 1 + r x rounds r x away; expm1, log1p keep it
    mean = jnp.sum(jnp.where(flat, jnp.expm1(exponents), valid * jnp.exp(exponents)), CELLS, keepdims=True) / count
    return (top + jnp.where(flat, jnp.log1p(mean), jnp.log(jnp.where(flat, 1, mean))) / sharpness)[:, 0, 0]
