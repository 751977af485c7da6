"""Class-evidence maps: how much each cell of the feature map adds to the logit. Pure functions, [B, h, w] out.

The attention W is class-agnostic and the head is not linear, so W alone is no class-activation map. These maps take the
features F, the weights p of any pooling of `cxa_jax.pooling` (1 / S for GAP) and the head. p is held fixed: what the
features did to the attention is not counted.

`head` is a function pooled [B, C] -> logits [B] that treats each row alone: parameters bound, dropout off.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cxa_jax.array_types import Features, Logits, Pooled
from cxa_jax.pooling import Weights, at_least_float32

Head = Callable[[Pooled], Logits]
FeatureHead = Callable[[Features], Logits]
Evidence = Float[Array, "B h w"]
Baseline = Float[Array, "#B C"]  # one row for all images, or one each
Kernel = Float[Array, "C"]

_HIGHEST = jax.lax.Precision.HIGHEST
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


def linearized_evidence(head: Head, features: Features, weights: Weights, pooled: Pooled | None = None) -> Evidence:
    """Compute each cell's share of the head's linear part at f.

    ``c_i = sum_k p_ik g_k F_ik`` with ``g = dl/df`` at f, so ``sum_i c_i = <g, f>``. With a linear head and p = 1 / S
    it is the class-activation map over S.

    Args:
      head: [B, C] -> [B].
      features: F, [B, h, w, C], as they were pooled (BN(F) in the paper's model).
      weights: p, [B, h, w, 1], or [B, h, w, C] where each channel has its own.
      pooled: f, [B, C]; by default sum p F, right for every pooling but 'lse'.

    Returns:
      c, [B, h, w], in logits; positive cells speak for cardiomegaly.
    """
    features, weights = at_least_float32(features), at_least_float32(weights)
    pooled = _pool(features, weights) if pooled is None else at_least_float32(pooled)
    return _contract(features, weights, _head_gradient(head, pooled))


def complete_evidence(head: Head, features: Features, weights: Weights, baseline: Baseline) -> Evidence:
    """Compute each cell's share of what lifts the logit from a baseline's to the image's.

    ``c_i = sum_k p_ik g_k (F_ik - f0_k)`` with g the mean of dl/df on the straight path from f0 to f (Gauss-Legendre,
    16 points; only the head is evaluated), so ``sum_i c_i = l(f) - l(f0)``. This needs sum_i p_ik = 1 and f = sum p F:
    true for every pooling but 'lse' and 'gem' ('gem' is complete from f0 = 0).

    Args:
      head: [B, C] -> [B].
      features: F, [B, h, w, C], as they were pooled.
      weights: p, [B, h, w, 1], or [B, h, w, C] where each channel has its own.
      baseline: f0, [1, C] for all images or [B, C]; for example the mean of f over negative dev images.

    Returns:
      c, [B, h, w], in logits; positive cells speak for cardiomegaly.
    """
    features, weights, baseline = (at_least_float32(x) for x in (features, weights, baseline))
    pooled = _pool(features, weights)
    baseline = jnp.broadcast_to(baseline, pooled.shape)
    nodes = jnp.asarray((_NODES + 1) / 2, pooled.dtype)  # from [-1, 1] to [0, 1]
    gradients = jax.vmap(lambda node: _head_gradient(head, baseline + node * (pooled - baseline)))(nodes)
    node_weights = jnp.asarray(_NODE_WEIGHTS / 2, pooled.dtype)
    gradient = jnp.einsum("n,nbk->bk", node_weights, gradients, precision=_HIGHEST)
    return _contract(features - baseline[:, None, None, :], weights, gradient)


def class_activation_map(features: Features, kernel: Kernel) -> Evidence:
    """Compute the classic class-activation map of a GAP model with a linear head, ``m_i = sum_k w_k F_ik``.

    The logit is ``sum_i m_i / S + b`` (Zhou et al. 2016; Fig. 9's GAP maps).

    Args:
      features: F, [B, h, w, C].
      kernel: w, [C], of the linear head; its bias has no place in the map.

    Returns:
      m, [B, h, w].
    """
    features, kernel = at_least_float32(features), at_least_float32(kernel)
    return jnp.einsum("bhwk,k->bhw", features, kernel, precision=_HIGHEST)


def linearized_activation_map(head: Head, features: Features, pooled: Pooled) -> Evidence:
    """Compute the class-activation map of any head, linearised at f: ``m_i = <g, F_i>`` with ``g = dl/df`` at f.

    Of a linear head g is its kernel, and this is `class_activation_map`. It is the evidence without p: what a cell
    would say if the attention looked at all cells alike.

    Args:
      head: [B, C] -> [B].
      features: F, [B, h, w, C], as they were pooled.
      pooled: f, [B, C].

    Returns:
      m, [B, h, w], in logits.
    """
    features, gradient = at_least_float32(features), _head_gradient(head, at_least_float32(pooled))
    return jnp.einsum("bhwk,bk->bhw", features, gradient, precision=_HIGHEST)


def grad_cam(feature_head: FeatureHead, features: Features, *, rectify: bool = True) -> Evidence:
    """Compute Grad-CAM (Selvaraju et al. 2017): ``relu(sum_k a_k F_ik)``, ``a_k = mean_i dl/dF_ik``.

    Averaging the gradient over cells drops p: with p held fixed the map is <g, F_i> / S whatever the attention.

    Args:
      feature_head: features [B, h, w, C] -> logits [B], each row alone: pooling and head, and the attention branch
        too if its gradient is to count.
      features: F, [B, h, w, C].
      rectify: False keeps the negative cells.

    Returns:
      [B, h, w], non-negative if rectified.
    """
    features = at_least_float32(features)
    gradient = jax.grad(lambda features: jnp.sum(feature_head(features)))(features)
    cam = jnp.einsum("bhwk,bk->bhw", features, jnp.mean(gradient, axis=(1, 2)), precision=_HIGHEST)
    return jax.nn.relu(cam) if rectify else cam


def _head_gradient(head: Head, pooled: Pooled) -> Pooled:
    return jax.grad(lambda pooled: jnp.sum(head(pooled)))(pooled)  # rows are independent: one backward pass for all


def _pool(features: Features, weights: Weights) -> Pooled:
    _check_weights(features, weights)
    if weights.shape[3] == 1:
        return jnp.einsum("bhwk,bhw->bk", features, weights[..., 0], precision=_HIGHEST)
    return jnp.einsum("bhwk,bhwk->bk", features, weights, precision=_HIGHEST)


def _contract(features: Features, weights: Weights, gradient: Pooled) -> Evidence:
    _check_weights(features, weights)
    if weights.shape[3] == 1:
        return weights[..., 0] * jnp.einsum("bhwk,bk->bhw", features, gradient, precision=_HIGHEST)
    return jnp.einsum("bhwk,bhwk,bk->bhw", features, weights, gradient, precision=_HIGHEST)


def _check_weights(features: Features, weights: Weights) -> None:
    if weights.shape[:3] != features.shape[:3] or weights.shape[3] not in (1, features.shape[3]):
        raise ValueError(
            f"weights must be [B, h, w, 1] or [B, h, w, C] for features {features.shape}, got {weights.shape}: "
            "pass one class's map at a time, weights[..., m : m + 1]"
        )
