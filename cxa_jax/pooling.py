"""Global poolings: from a feature map [B, h, w, C] to one vector [B, C], and the weight of every cell in it.

Every pooling of `POOLINGS` is called the same way and returns the pooled features f beside their weights p::

    pooled, p = POOLINGS[name](features, attention_logits, mask=None, temperature=1.0)

p is df/dF with the attention logits held fixed: [B, h, w, 1] where all channels share one map, [B, h, w, C] where each
channel has its own (its mean over channels is the map to draw). `pooling_weights` gives p alone; `pool` and
`pool_channels` average with it. All is computed in float32 whatever the compute type of the network (float64 stays
float64). Values and gradients are finite for logits in [-1e3, 1e3], features up to 1e20 in size and temperatures from
1e-6 to 1e6. Cells where `mask` is False carry no weight, whatever finite numbers they hold. A row without valid cells
gives zeros, in f, p and every gradient. docs/amm.md has the mathematics.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from cxa_jax import masked_cells as cells
from cxa_jax.array_types import AttentionLogits, Features, Pooled

Weights = Float[Array, "B h w M"]  # p: M = 1 for one map, M = C for one map per channel, else one per class
CellMask = Bool[Array, "B h w"]  # True = the cell counts
PooledClasses = Float[Array, "B M C"]  # one vector for each of M maps
Kernel = Float[Array, "_ _"]
Bias = Float[Array, "M"]


def gwap(
    features: Features,
    attention_logits: AttentionLogits,
    *,
    mask: CellMask | None = None,
    temperature: ArrayLike = 1.0,
) -> Pooled | PooledClasses:
    """Pool features by globally weighted averaging with the attention W = sigmoid(z).

    ``f_k = sum_i W_i F_ik / sum_i W_i``, i over cells, by ``softmax_i(log sigmoid(z_i))``: the same number, without the
    quotient's 0 / 0 at low logits and without an epsilon that would bias it.

    Args:
      features: F, [B, h, w, C].
      attention_logits: z, [B, h, w, M]; M = 1 is the paper's one shared map.
      mask: [B, h, w], True where a cell counts; None counts all.
      temperature: > 0, divides log W; 1 is the paper.

    Returns:
      f, [B, C] for M = 1, else [B, M, C]: one vector for each map.

    Source: Eqs. (8), (9).
    """
    return amm(features, attention_logits, mask=mask, temperature=temperature)[0]


def gap(features: Features, *, mask: CellMask | None = None) -> Pooled:
    """Pool features by global averaging: ``f_k = sum_i F_ik / S`` (the paper's GAP models, Table 5).

    Args:
      features: F, [B, h, w, C].
      mask: [B, h, w], True where a cell counts; None counts all.

    Returns:
      f, [B, C].
    """
    features, valid = at_least_float32(features), cells.find_valid(features, mask)
    return jnp.sum(jnp.where(valid, features, 0), axis=cells.CELLS) / cells.count_valid(valid, features.dtype)[:, 0, 0]


def amm_weights(
    attention_logits: AttentionLogits, *, mask: CellMask | None = None, temperature: ArrayLike = 1.0
) -> Weights:
    """Return ``p = softmax(log sigmoid(z) / temperature)`` over cells: W / sum W at temperature 1 (Eq. 9)."""
    return cells.softmax(jax.nn.log_sigmoid(at_least_float32(attention_logits)), mask, temperature)


def softmax_weights(
    attention_logits: AttentionLogits, *, mask: CellMask | None = None, temperature: ArrayLike = 1.0
) -> Weights:
    """Return ``p = softmax(z / temperature)`` over cells (Ilse et al. 2018)."""
    return cells.softmax(at_least_float32(attention_logits), mask, temperature)


def pool(features: Features, weights: Weights) -> Pooled | PooledClasses:
    """Average features with the weights of one map, or of one map per class.

    ``f_k = sum_i p_i F_ik``; with M > 1 maps ``f_mk = sum_i p_im F_ik``.

    Args:
      features: F, [B, h, w, C].
      weights: p, [B, h, w, M].

    Returns:
      [B, C] for M = 1, else [B, M, C].
    """
    features, weights = at_least_float32(features), at_least_float32(weights)
    # A contraction over cells, so p is never copied to all C channels (Table 3's "hard-coded" convolution);
    # HIGHEST because accelerators otherwise round float32 operands to TF32 or bfloat16.
    pooled = jnp.einsum("bhwk,bhwm->bmk", features, weights, precision=jax.lax.Precision.HIGHEST)
    return pooled[:, 0] if weights.shape[-1] == 1 else pooled


def pooling_weights(name: str, features, attention_logits=None, *, mask=None, temperature=1.0) -> Weights:
    """Return p of POOLINGS[name]; under jit nothing else is computed.

    Args:
      name: key of POOLINGS.
      features: F, [B, h, w, C].
      attention_logits: z, [B, h, w, M]; None for the names in FEATURES_ONLY.
      mask: [B, h, w], True where a cell counts; None counts all.
      temperature: > 0.

    Returns:
      p, [B, h, w, M], for `pool`; of gmp, lse, gem and topk [B, h, w, C], for `pool_channels`.
    """
    return POOLINGS[name](features, attention_logits, mask=mask, temperature=temperature)[1]


def pool_channels(features: Features, weights: Weights) -> Pooled:
    """Average each channel with its own weights, or all with the same ones: ``f_k = sum_i p_ik F_ik``.

    The pooled features of every entry of POOLINGS but lse, which adds a divergence to this sum.

    Args:
      features: F, [B, h, w, C].
      weights: p, [B, h, w, C] or [B, h, w, 1].

    Returns:
      f, [B, C].
    """
    features, weights = at_least_float32(features), at_least_float32(weights)
    return jnp.sum(weights * features, axis=cells.CELLS)


def gated_attention_logits(
    features: Features, tanh_kernel: Kernel, gate_kernel: Kernel, kernel: Kernel
) -> AttentionLogits:
    """Return ``z_i = w . (tanh(V F_i) * sigmoid(U F_i))``: V, U, w are learnt (Ilse et al. 2018, Eq. 9).

    Args:
      features: F, [B, h, w, C].
      tanh_kernel: V, [C, L].
      gate_kernel: U, [C, L].
      kernel: w, [L, M].

    Returns:
      z, [B, h, w, M], for the pooling 'gated'.
    """
    hidden = jnp.tanh(_dense(features, tanh_kernel)) * jax.nn.sigmoid(_dense(features, gate_kernel))
    return _dense(hidden, kernel)


def pcam_logits(features: Features, kernel: Kernel, bias: Bias) -> AttentionLogits:
    """Return ``z_i = w . F_i + b``, the classifier's own logit at each cell, for the pooling 'pcam' (Ye et al. 2020).

    The logit of the image is then the same classifier on the pooled features, ``w . f + b``.

    Args:
      features: F, [B, h, w, C].
      kernel: w, [C, M], shared with the classifier.
      bias: b, [M], shared with the classifier.

    Returns:
      z, [B, h, w, M].
    """
    return _dense(features, kernel) + at_least_float32(bias)[None, None, None, :]


def average_pool_2x2_same(x: AttentionLogits) -> AttentionLogits:
    """Average each cell with its right, lower and lower-right neighbours, those outside left out of the mean.

    The 2x2 'same' average pool with stride 1 of Table 3, as Keras computes it. It moves what it averages half a cell
    up and left, and commutes with a 1x1 convolution.

    Args:
      x: [B, h, w, M].

    Returns:
      [B, h, w, M], in the type of x.
    """
    # Repeating the last row and column gives the mean over the neighbours inside: {a} = {a, a}.
    rows = x + jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)  # the gradient of jnp.pad would be sent between devices
    return (rows + jnp.concatenate([rows[:, :, 1:], rows[:, :, -1:]], axis=2)) / 4


def amm(features, attention_logits, *, mask=None, temperature=1.0) -> tuple[Pooled | PooledClasses, Weights]:
    """Pool as `gwap`, and return the weights too."""
    weights = amm_weights(attention_logits, mask=mask, temperature=temperature)
    return pool(features, weights), weights


def softmax_attention(features, attention_logits, *, mask=None, temperature=1.0):
    """Pool with softmax attention, ``f_k = sum_i softmax(z / temperature)_i F_ik`` (Ilse et al. 2018)."""
    weights = softmax_weights(attention_logits, mask=mask, temperature=temperature)
    return pool(features, weights), weights


def global_average(features, attention_logits=None, *, mask=None, temperature=1.0):
    """Pool as `gap`, and return p = 1 / S; logits and temperature are not read."""
    valid, dtype = cells.find_valid(features, mask), at_least_float32(features).dtype
    return gap(features, mask=mask), valid.astype(dtype) / cells.count_valid(valid, dtype)


def global_max(features, attention_logits=None, *, mask=None, temperature=1.0):
    """Pool by ``f_k = max_i F_ik``, per channel; ties share the weight; logits and temperature are not read."""
    valid = cells.find_valid(features, mask)

    def pooled(features):
        largest = jnp.max(jnp.where(valid, features, jnp.finfo(features.dtype).min), axis=cells.CELLS)
        return cells.zero_if_empty(largest, valid)

    return weights_by_gradient(pooled, features)


def log_sum_exp(features, attention_logits=None, *, mask=None, temperature=1.0, sharpness=10.0):
    """Pool by ``f_k = (1 / r) log mean_i exp(r F_ik)``, r = sharpness / temperature, per channel (Wang et al. 2017).

    p = softmax(r F) sums to one, yet ``f = sum p F - KL(p || 1 / S) / r``: the only entry where f is not sum p F.
    """
    r, valid = (
        sharpness / cells.to_positive(temperature, at_least_float32(features).dtype),
        cells.find_valid(features, mask),
    )
    return weights_by_gradient(lambda features: cells.log_mean_exp(features, r, valid), features)


def generalized_mean(features, attention_logits=None, *, mask=None, temperature=1.0, exponent=3.0, floor=1e-6):
    """Pool by ``f_k = (mean_i max(F_ik, floor)^q)^(1 / q)``, q = exponent / temperature (GeM, Radenovic et al. 2019).

    f = sum p F, while sum p <= 1 for q >= 1. Features below the floor get no weight.
    """
    valid = cells.find_valid(features, mask)

    def pooled(features):
        q = exponent / cells.to_positive(temperature, features.dtype)
        logs = jnp.log(jnp.maximum(features, floor))
        return cells.zero_if_empty(jnp.exp(cells.log_mean_exp(logs, q, valid)), valid)

    return weights_by_gradient(pooled, features)


def top_k_mean(features, attention_logits=None, *, mask=None, temperature=1.0, fraction=0.1):
    """Pool by the mean of the largest k = fraction x S cells (at least one) of each channel; only F is read."""
    valid = cells.find_valid(features, mask)

    def pooled(features):
        values = jnp.where(valid, features, jnp.finfo(features.dtype).min)
        values = jnp.moveaxis(values, 3, 1).reshape(values.shape[0], values.shape[3], -1)
        largest = jax.lax.top_k(values, math.ceil(fraction * values.shape[2]))[0]
        k = jnp.maximum(
            jnp.round(fraction * cells.count_valid(valid, features.dtype)[:, 0]), 1
        )  # S is what the mask leaves
        rank = jnp.arange(largest.shape[2], dtype=features.dtype)[None, None, :]
        return cells.zero_if_empty(jnp.sum(jnp.where(rank < k, largest, 0), axis=2) / k[:, 0], valid)

    return weights_by_gradient(pooled, features)


def weights_by_gradient(pooled: Callable[[Features], Pooled], features: Features) -> tuple[Pooled, Weights]:
    """Return pooled(F) and ``p_ik = df_k / dF_ik`` of a pooling that treats each channel of F alone.

    Under jit the gradient is not computed when p is not used.
    """
    value, pullback = jax.vjp(pooled, at_least_float32(features))
    return value, pullback(jnp.ones_like(value))[0]


# The one table of poolings: a new one is a function and a line here (docs/amm.md has an example).
POOLINGS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "amm": amm,  # logits of the attention branch (Table 3)
    "softmax": softmax_attention,  # logits of the attention branch
    "gated": softmax_attention,  # logits of gated_attention_logits, with learnt V, U, w
    "pcam": amm,  # logits of pcam_logits, with the kernel and bias of a linear head
    "gap": global_average,
    "gmp": global_max,
    "lse": log_sum_exp,
    "gem": generalized_mean,
    "topk": top_k_mean,
}
FEATURES_ONLY = frozenset({"gap", "gmp", "lse", "gem", "topk"})  # logits may be None; a model builds no branch for them
NOT_SUMS = frozenset({"lse"})  # f is not sum p F
NOT_AVERAGES = NOT_SUMS | {"gem"}  # nor are those whose sum of p is not 1: their evidence is not complete


def at_least_float32(x: Array) -> Array:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _dense(x: Array, kernel: Array) -> Array:
    x, kernel = at_least_float32(x), at_least_float32(kernel)
    return jnp.einsum("bhwc,cm->bhwm", x, kernel, precision=jax.lax.Precision.HIGHEST)
