"""Class weights and the weighted binary cross-entropy of Eq. (1)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cxa_jax.array_types import Labels, Logits
from cxa_jax.errors import UserError


def compute_class_weights(labels: np.ndarray | Array | Sequence[int]) -> tuple[float, float]:
    """Compute the weight of each class from the labels of the training split.

    ``w_c = N / (2 N_c)``: both classes then carry half of the total weight N.

    Args:
      labels: [N] of 0 (no finding) and 1 (cardiomegaly), without padding rows.

    Returns:
      (w_neg, w_pos); (0.5169, 15.295) for the 45,450 + 1,536 training images of the paper.

    Raises:
      UserError: a label is neither 0 nor 1, or one class has no image.

    Source: "Data preprocessing" ("class weights estimated from the training set"; the formula is ours).
    """
    labels = np.asarray(labels).reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"labels must be 0 or 1, got the values {np.unique(labels)[:8].tolist()}")
    num_positive = int(np.count_nonzero(labels == 1))
    num_negative = labels.size - num_positive
    if num_positive == 0 or num_negative == 0:
        raise UserError(
            f"class weights need both classes in the training split, which has {num_negative} negative and "
            f"{num_positive} positive labels: use more data, or set --config.train.class_weights=none"
        )
    return labels.size / (2 * num_negative), labels.size / (2 * num_positive)


def weighted_binary_cross_entropy(
    logits: Logits, labels: Labels, class_weights: tuple[float, float] = (1.0, 1.0)
) -> Logits:
    """Compute the class-weighted binary cross-entropy of each row, on logits and unreduced.

    ``loss_b = -w_pos y_b log s(l_b) - w_neg (1 - y_b) log(1 - s(l_b))``, s the sigmoid; finite for every finite logit.

    Args:
      logits: [B], before the sigmoid; any float type, computed in float32 (float64 stays float64).
      labels: [B], integers 0 or 1.
      class_weights: (w_neg, w_pos), both positive; (1, 1) is the plain loss.

    Returns:
      [B], one loss for each row; padding rows are the caller's to mask.

    Raises:
      ValueError: shapes differ or are not [B], labels are not integers, or the weights are not two positive numbers.

    Source: Eq. (1).
    """
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits and labels must both be [B], got {logits.shape} and {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers 0 or 1, got {labels.dtype}")
    if len(class_weights) != 2 or not all(np.isfinite(weight) and weight > 0 for weight in class_weights):
        raise ValueError(f"class_weights must be (w_neg, w_pos), two positive numbers, got {class_weights}")
    w_neg, w_pos = (float(weight) for weight in class_weights)
    if logits.dtype != jnp.float64:
        logits = logits.astype(jnp.float32)
    # softplus(-l) = -log s(l): no sigmoid that rounds to 0 or 1, hence no clipping and no log of zero
    return jnp.where(labels == 1, w_pos * jax.nn.softplus(-logits), w_neg * jax.nn.softplus(logits))
