"""Metrics against scikit-learn, slow twins and hand-made cases."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from cxa_jax import metrics
from cxa_jax.errors import UserError


def _draw(seed: int, num_images: int = 300, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and scores with many ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_images) < 0.3).astype(np.int32)
    return labels, np.round(np.clip(rng.normal(0.35 + 0.2 * labels, 0.2), 0, 1), decimals)


def _pairwise_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("decimals", [1, 6])
def test_auroc_is_the_share_of_pairs_in_order(decimals: int):
    labels, scores = _draw(1, decimals=decimals)
    assert metrics.compute_auroc(labels, scores) == pytest.approx(_pairwise_auroc(labels, scores), abs=1e-12)


def test_auroc_takes_logits_and_depends_on_the_order_alone():
    labels, scores = _draw(2, decimals=8)
    logits = 7 * scores - 300
    assert metrics.compute_auroc(labels, logits) == pytest.approx(metrics.compute_auroc(labels, scores), abs=1e-12)
    assert metrics.compute_auroc(labels, -logits) == pytest.approx(1 - metrics.compute_auroc(labels, scores), abs=1e-12)


def test_confusion_matrix_has_true_rows_and_counts_the_threshold_as_positive():
    confusion = metrics.compute_confusion_matrix([0, 0, 0, 1, 1], [0.2, 0.5, 0.4, 0.5, 0.1], 0.5)
    assert confusion.tolist() == [[2, 1], [1, 1]]


def test_confusion_metrics_equal_scikit_learn():
    labels, scores = _draw(3)
    predicted = (scores >= 0.5).astype(int)
    values = metrics.compute_metrics(labels, scores, 0.5)
    for name in ("precision", "recall", "f1"):
        reference = getattr(sklearn_metrics, f"{name}_score")
        assert values[name] == pytest.approx(reference(labels, predicted), abs=1e-12)
        assert values[f"{name}_negative"] == pytest.approx(reference(labels, predicted, pos_label=0), abs=1e-12)
        assert values[f"{name}_weighted"] == pytest.approx(reference(labels, predicted, average="weighted"), abs=1e-12)
    assert values["accuracy"] == pytest.approx(np.mean(labels == predicted))
    assert values["confusion_matrix"] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert values["tpr"] == values["recall"] and values["npv"] == values["precision_negative"]
    assert values["fpr"] == pytest.approx(predicted[labels == 0].mean())
    assert values["brier_score"] == pytest.approx(sklearn_metrics.brier_score_loss(labels, scores))
    assert values["average_precision"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))


def test_stated_test_set_gives_the_numbers_of_the_papers_operating_point():
    values = metrics.compute_confusion_metrics([[8678, 1183], [289, 780]])
    expected = {"precision": 0.397, "npv": 0.968, "accuracy": 0.865, "f1": 0.515, "tpr": 0.73, "fpr": 0.12}
    expected |= {"precision_weighted": 0.912, "recall_weighted": 0.865, "f1_weighted": 0.882}
    assert {name: round(float(values[name]), 3) for name in expected} == expected


def test_confusion_matrices_of_disjoint_sets_add_up_and_metrics_take_many_at_once():
    labels, scores = _draw(4)
    parts = [slice(99), slice(99, None)]
    halves = np.stack([metrics.compute_confusion_matrix(labels[part], scores[part], 0.4) for part in parts])
    assert np.array_equal(halves.sum(0), metrics.compute_confusion_matrix(labels, scores, 0.4))
    together = metrics.compute_confusion_metrics(halves)
    assert together["f1"][1] == metrics.compute_confusion_metrics(halves[1])["f1"]


def test_one_class_leaves_ranking_undefined_not_zero():
    values = metrics.compute_metrics([1, 1, 1], [0.2, 0.6, 0.9], 0.5)
    undefined = ("auroc", "fpr", "specificity", "recall_negative", "sensitivity_at_specificity_0.9")
    assert all(math.isnan(values[name]) for name in undefined)
    assert values["recall"] == values["recall_weighted"] == pytest.approx(2 / 3)
    assert values["precision"] == values["precision_weighted"] == 1
    assert math.isnan(metrics.compute_average_precision([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.compute_youden_threshold([0, 0], [0.1, 0.2]))
    assert [len(column) for column in metrics.compute_roc_curve([1], [0.3])] == [0, 0, 0]


def test_no_predicted_positive_leaves_precision_undefined_and_f1_zero():
    values = metrics.compute_metrics([0, 1], [0.1, 0.2], 0.9)
    assert math.isnan(values["precision"]) and math.isnan(values["precision_weighted"])
    assert values["f1"] == 0 and values["recall"] == 0 and values["npv"] == 0.5


def test_undefined_values_are_written_as_null():
    values = metrics.undefined_to_none(metrics.compute_metrics([1, 1], [0.2, 0.6]) | {"nested": [math.nan, {"a": 1.0}]})
    read = json.loads(json.dumps(values, allow_nan=False))
    assert read["auroc"] is None and read["nested"] == [None, {"a": 1.0}] and read["num_images"] == 2


def test_youden_threshold_is_the_best_of_all_and_the_highest_of_ties():
    labels, scores = _draw(5)
    best = metrics.compute_youden_threshold(labels, scores)
    youden = {}
    for threshold in np.unique(scores):
        (tn, fp), (fn, tp) = metrics.compute_confusion_matrix(labels, scores, threshold)
        youden[threshold] = round(tp / (tp + fn) - fp / (fp + tn), 12)
    assert best == max(threshold for threshold, value in youden.items() if value == max(youden.values()))
    assert metrics.compute_youden_threshold([1, 0, 1, 0], [0.9, 0.7, 0.7, 0.1]) == 0.9
    assert np.isfinite(metrics.compute_youden_threshold([1, 0], [0.1, 0.9]))  # worse than chance: still a score


def test_sensitivity_at_specificity_is_the_best_over_thresholds():
    labels, scores = _draw(6)
    candidates = [0.0]
    for threshold in np.unique(scores):
        values = metrics.compute_metrics(labels, scores, threshold, ())
        if values["specificity"] >= 0.8:
            candidates.append(values["tpr"])
    assert metrics.compute_sensitivity_at_specificity(labels, scores, 0.8) == pytest.approx(max(candidates))
    assert metrics.compute_sensitivity_at_specificity([0] * 5 + [1], [0.9, 0.1, 0.1, 0.1, 0.1, 0.5], 0.8) == 1


def test_reliability_curve_and_calibration_error_equal_a_loop():
    labels, scores = _draw(7, decimals=3)
    scores[:2] = (0.0, 1.0)
    curve = metrics.compute_reliability_curve(labels, scores, 10)
    error = 0.0
    for index, lower in enumerate(np.arange(10) / 10):
        inside = (scores * 10 >= 10 * lower) & ((scores * 10 < 10 * lower + 1) | (index == 9))
        assert curve["count"][index] == inside.sum()
        if inside.any():
            assert curve["positive_share"][index] == pytest.approx(labels[inside].mean())
            error += inside.mean() * abs(labels[inside].mean() - scores[inside].mean())
        else:
            assert np.isnan(curve["mean_score"][index])
    assert metrics.compute_calibration_error(labels, scores, 10) == pytest.approx(error, abs=1e-12)


def test_calibrated_scores_have_a_small_error_and_shifted_ones_a_large_one():
    rng = np.random.default_rng(8)
    scores = rng.random(40_000)
    labels = (rng.random(40_000) < scores).astype(int)
    assert metrics.compute_calibration_error(labels, scores) < 0.02
    assert metrics.compute_calibration_error(labels, np.sqrt(scores)) > 0.1


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [0.1, np.nan, 0.2], r"scores\[1\] is nan"),
        ([0, 1, 1], [0.1, 0.3, 1.2], r"scores\[2\] is 1\.2 .*probability"),
        ([0, 1, 2], [0.1, 0.3, 0.2], r"labels\[2\] is 2"),
        ([0, 1], [0.1, 0.3, 0.2], r"\(2,\) and \(3,\)"),
        ([[0, 1]], [[0.1, 0.3]], r"\(1, 2\)"),
        ([], [], "non-empty"),
    ],
)
def test_bad_input_is_named(labels: list, scores: list, message: str):
    with pytest.raises(UserError, match=message):
        metrics.compute_metrics(labels, scores)


def test_undefined_threshold_and_impossible_counts_are_refused():
    with pytest.raises(UserError, match="threshold is nan"):
        metrics.compute_confusion_matrix([0, 1], [0.1, 0.2], math.nan)
    with pytest.raises(UserError, match="non-negative counts"):
        metrics.compute_confusion_metrics([[1, -1], [0, 2]])
