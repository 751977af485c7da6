"""Class weights, the weighted binary cross-entropy of Eq. (1), and two losses for labels that may be wrong."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from cxa_jax.array_types import Labels, Logits
from cxa_jax.errors import UserError
from cxa_jax.findings import OTHERS

Loss = Callable[[Logits, Labels, tuple[float, float]], Logits]  # (logits, labels, class_weights) -> a loss for each row


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
    agreeing, _, weights = _orient(logits, labels, class_weights)
    # softplus(-l) = -log s(l): no sigmoid that rounds to 0 or 1, hence no clipping and no log of zero
    return weights * jax.nn.softplus(-agreeing)


def smoothed_binary_cross_entropy(
    logits: Logits, labels: Labels, class_weights: tuple[float, float] = (1.0, 1.0), *, smoothing: float
) -> Logits:
    """Compute the cross-entropy with smoothed labels, ``(1 - e / 2) CE(y) + (e / 2) CE(1 - y)``, class-weighted.

    A confident answer no longer has a loss of zero, so a wrong label pulls less: the best score for a certain y = 1
    is 1 - e / 2 (Szegedy et al. 2016). Arguments as of `weighted_binary_cross_entropy`; the class weight is that of the
    given label.

    Args:
      smoothing: e, in [0, 1]; 0 is Eq. (1), 1 forgets the label.
    """
    agreeing, disagreeing, weights = _orient(logits, labels, class_weights)
    right, wrong = jax.nn.softplus(-agreeing), jax.nn.softplus(-disagreeing)
    return weights * ((1 - smoothing / 2) * right + smoothing / 2 * wrong)


def generalized_cross_entropy(
    logits: Logits, labels: Labels, class_weights: tuple[float, float] = (1.0, 1.0), *, exponent: float
) -> Logits:
    """Compute the generalised cross-entropy ``(1 - p^q) / q``, class-weighted, p the score of the given label.

    Its gradient is Eq. (1)'s times p^q, so images whose label the network does not believe count less; it lies between
    Eq. (1) (q -> 0) and the mean absolute error (q = 1) (Zhang and Sabuncu 2018). Arguments as of
    `weighted_binary_cross_entropy`.

    Args:
      exponent: q, in (0, 1].
    """
    agreeing, _, weights = _orient(logits, labels, class_weights)
    return weights * -jnp.expm1(exponent * jax.nn.log_sigmoid(agreeing)) / exponent


def mean_loss_of_others(loss: Loss, finding_logits: Array, findings: Array) -> Logits:
    """Return the mean over the thirteen findings besides cardiomegaly of an unweighted loss, [B].

    Args:
      loss: see `create_loss`.
      finding_logits: [B, 14], in the order of `FINDINGS`.
      findings: [B, 14], integers 0 or 1.
    """
    logits, labels = finding_logits[:, np.array(OTHERS)], findings[:, np.array(OTHERS)]
    return jnp.mean(loss(logits.reshape(-1), labels.reshape(-1), (1.0, 1.0)).reshape(logits.shape), axis=1)


def create_loss(train_config: ConfigDict) -> Loss:
    """Return the training loss that config.train names: 'bce', 'smoothed' or 'gce'."""
    return {
        "bce": weighted_binary_cross_entropy,
        "smoothed": partial(smoothed_binary_cross_entropy, smoothing=train_config.label_smoothing),
        "gce": partial(generalized_cross_entropy, exponent=train_config.gce_exponent),
    }[train_config.loss]


def _orient(logits: Logits, labels: Labels, class_weights: tuple[float, float]) -> tuple[Logits, Logits, Array]:
    """Return the logit of the given label, that of the other one, and the class weight of each row, checked."""
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits and labels must both be [B], got {logits.shape} and {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers 0 or 1, got {labels.dtype}")
    if len(class_weights) != 2 or not all(np.isfinite(weight) and weight > 0 for weight in class_weights):
        raise ValueError(f"class_weights must be (w_neg, w_pos), two positive numbers, got {class_weights}")
    w_neg, w_pos = (float(weight) for weight in class_weights)
    if logits.dtype != jnp.float64:
        logits = logits.astype(jnp.float32)
    positive = labels == 1
    weights = jnp.where(positive, w_pos, w_neg).astype(logits.dtype)
    return jnp.where(positive, logits, -logits), jnp.where(positive, -logits, logits), weights
