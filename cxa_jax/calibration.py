"""Recalibration of logits: temperature and Platt scaling fitted on dev, and a known shift of the prevalence.

A maximum-likelihood fit on dev holds for dev's prevalence. Training with class weights moves all scores up, and the
official test list has three times the prevalence of the training list: `shift_prior` undoes such shifts.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from cxa_jax.errors import UserError
from cxa_jax.metrics import check_labels_and_scores

TEMPERATURE_RANGE = (0.01, 100.0)  # a dev set that is perfectly separated would ask for temperature 0


@dataclass(frozen=True)
class Calibration:
    """An increasing map of logits: sigmoid(scale * logit + bias)."""

    scale: float
    bias: float

    def apply(self, logits: ArrayLike) -> np.ndarray:
        """Return calibrated scores [N] in [0, 1] of logits [N]."""
        return special.expit(self.scale * np.asarray(logits, np.float64) + self.bias)


def compute_log_loss(targets: np.ndarray, logits: np.ndarray) -> float:
    """Compute the mean binary cross-entropy on logits: log(1 + e^z) - y z."""
    return float(np.mean(np.logaddexp(0.0, logits) - targets * logits))


def fit_temperature(labels: ArrayLike, logits: ArrayLike) -> Calibration:
    """Fit sigmoid(z / T) by maximum likelihood (Guo et al. 2017); T is kept in [0.01, 100].

    Args:
        labels: [N] of dev, 0 or 1; both classes.
        logits: [N] of dev.

    Returns:
        Calibration with scale 1 / T and bias 0. The order of images, hence the AUROC, stays.

    Raises:
        UserError: only one class, besides `check_labels_and_scores`.
    """
    labels, logits = _check_both_classes(labels, logits)
    result = optimize.minimize_scalar(
        lambda log_temperature: compute_log_loss(labels, logits / math.exp(log_temperature)),
        bounds=np.log(TEMPERATURE_RANGE),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return Calibration(scale=math.exp(-result.x), bias=0.0)


def fit_platt(labels: ArrayLike, logits: ArrayLike) -> Calibration:
    """Fit sigmoid(a z + b) by maximum likelihood with Platt's targets (1999).

    The targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2) stand for 1 and 0: they keep the fit finite where dev is
    perfectly separated.

    Args:
        labels: [N] of dev, 0 or 1; both classes.
        logits: [N] of dev.

    Returns:
        Calibration. A model worse than chance on dev gets a negative scale, which turns its order round.

    Raises:
        UserError: only one class, besides `check_labels_and_scores`.
    """
    labels, logits = _check_both_classes(labels, logits)
    num_positives, num_negatives = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (num_positives + 1) / (num_positives + 2), 1 / (num_negatives + 2))
    mean, spread = logits.mean(), logits.std() or 1.0
    standardized = (logits - mean) / spread  # so that one tolerance serves logits of any size

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        calibrated = parameters[0] * standardized + parameters[1]
        residual = special.expit(calibrated) - targets
        return compute_log_loss(targets, calibrated), np.array([np.mean(residual * standardized), residual.mean()])

    result = optimize.minimize(loss_and_gradient, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8})
    scale, bias = result.x[0] / spread, result.x[1] - result.x[0] * mean / spread
    return Calibration(float(scale), float(bias))


def shift_prior(logits: ArrayLike, old_prevalence: float, new_prevalence: float) -> np.ndarray:
    """Move calibrated logits [N] to another prevalence: z + logit(new) - logit(old).

    Exact where p(image | class) stays the same. Class weights w1, w0 act in training like
    old_prevalence = w1 N1 / (w1 N1 + w0 N0), that is 0.5 for balanced weights.

    Raises:
        UserError: a prevalence outside (0, 1).
    """
    for prevalence in (old_prevalence, new_prevalence):
        if not 0 < prevalence < 1:
            raise UserError(f"prevalence is {prevalence}; needed is a share between 0 and 1, such as 0.0978")
    return np.asarray(logits, np.float64) + special.logit(new_prevalence) - special.logit(old_prevalence)


def _check_both_classes(labels: ArrayLike, logits: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, logits = check_labels_and_scores(labels, logits)
    if not 0 < labels.sum() < len(labels):
        raise UserError(f"calibration needs both classes; all {len(labels)} labels are {labels[0]}")
    return labels, logits
