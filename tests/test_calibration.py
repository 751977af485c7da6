"""Calibration: known parameters are recovered, the likelihood is at its minimum, separable data stay finite."""

import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from cxa_jax import calibration
from cxa_jax.errors import UserError
from cxa_jax.metrics import compute_auroc, compute_calibration_error


def _draw(scale: float, bias: float, num_images: int = 20_000, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, num_images)
    return (rng.random(num_images) < special.expit(scale * logits + bias)).astype(int), logits


def test_temperature_is_recovered_and_keeps_the_order():
    labels, logits = _draw(0.5, 0.0)
    fitted = calibration.fit_temperature(labels, logits)
    assert fitted.scale == pytest.approx(0.5, rel=0.05) and fitted.bias == 0
    scores = fitted.apply(logits)
    assert compute_auroc(labels, scores) == pytest.approx(compute_auroc(labels, logits), abs=1e-12)
    assert compute_calibration_error(labels, scores) < 0.02 < compute_calibration_error(labels, special.expit(logits))
    best = calibration.compute_log_loss(labels, logits * fitted.scale)
    for factor in (0.98, 1.02):
        assert calibration.compute_log_loss(labels, logits * fitted.scale * factor) > best


def test_platt_is_recovered_and_equals_logistic_regression():
    labels, logits = _draw(0.4, 0.8)
    fitted = calibration.fit_platt(labels, 100 * logits)  # any unit
    assert (100 * fitted.scale, fitted.bias) == pytest.approx((0.4, 0.8), rel=0.08)
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(logits[:, None], labels)
    expected = (reference.coef_[0, 0], reference.intercept_[0])
    assert (100 * fitted.scale, fitted.bias) == pytest.approx(expected, rel=5e-3)  # Platt's targets differ a little


def test_separated_dev_data_give_finite_maps():
    labels, logits = [0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0]
    platt = calibration.fit_platt(labels, logits)
    assert 0 < platt.scale < 10 and abs(platt.bias) < 1e-5
    temperature = calibration.fit_temperature(labels, logits)
    assert 1 <= temperature.scale <= 100.001
    assert np.isfinite(temperature.apply([-1e4, 1e4])).all()
    assert np.isfinite(calibration.fit_platt([0, 1], [3.0, 3.0]).bias)


def test_prior_shift_is_bayes_rule():
    rng = np.random.default_rng(2)
    old, new = 0.5, 0.1
    x = rng.normal(size=5)
    ratio = np.exp(2 * x)  # p(x | positive) / p(x | negative)
    posterior = {pi: ratio * pi / (ratio * pi + 1 - pi) for pi in (old, new)}
    shifted = calibration.shift_prior(special.logit(posterior[old]), old, new)
    assert special.expit(shifted) == pytest.approx(posterior[new], abs=1e-12)


def test_one_class_and_silly_shares_are_refused():
    for fit in (calibration.fit_temperature, calibration.fit_platt):
        with pytest.raises(UserError, match="both classes; all 2 labels are 1"):
            fit([1, 1], [0.2, 0.4])
    with pytest.raises(UserError, match="prevalence is 0"):
        calibration.shift_prior([0.1], 0.5, 0)
