"""What a predictions file says: every number against scikit-learn, the protocol beside it, strata, speed."""

import time

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from cxa_jax.classification import describe_classification
from cxa_jax.metrics import compute_youden_threshold
from cxa_jax.predictions import PredictionTable
from cxa_jax.prevalence import compute_metrics_at_prevalence
from cxa_jax.strata import MIN_PATIENTS


def make_table(num_images: int, num_positives: int, seed: int, **columns) -> PredictionTable:
    rng = np.random.default_rng(seed)
    label = (np.arange(num_images) < num_positives).astype(int)
    logit = rng.normal(size=num_images) + 1.7 * label - 2
    patient = np.where(
        label == 1, rng.integers(0, max(num_positives // 3, 1), num_images), 10**6 + np.arange(num_images) // 4
    )
    findings = np.where(label == 1, rng.choice(["Cardiomegaly", "Cardiomegaly|Effusion"], num_images), "No Finding")
    attributes = {
        "view": rng.choice(["AP", "PA"], num_images),
        "sex": rng.choice(["F", "M"], num_images),
        "age": rng.integers(1, 95, num_images),
        "findings": findings,
    }
    ids = np.array([f"image{index:05d}" for index in range(num_images)])
    table = PredictionTable(ids, label, 1 / (1 + np.exp(-logit)), patient.astype(str), logit, attributes)
    return PredictionTable(**(vars(table) | columns))


@pytest.fixture(scope="module")
def described():
    test, dev = make_table(500, 100, 0), make_table(300, 60, 1)
    return test, dev, describe_classification(test, dev, num_resamples=100)


def test_numbers_equal_scikit_learns(described):
    test, _, report = described
    expected = {
        "auroc": sklearn_metrics.roc_auc_score(test.label, test.score),
        "average_precision": sklearn_metrics.average_precision_score(test.label, test.score),
        "brier_score": sklearn_metrics.brier_score_loss(test.label, test.score),
    }
    for name, value in expected.items():
        assert report[name]["estimate"] == pytest.approx(value, abs=1e-12), name
        assert report[name]["low"] < value < report[name]["high"], name
    for section in ("at_0.5", "at_dev_threshold"):
        point = report[section]
        called = test.score >= point["threshold"]
        assert point["confusion_matrix"] == sklearn_metrics.confusion_matrix(test.label, called).tolist()
        table = sklearn_metrics.classification_report(test.label, called, output_dict=True, zero_division=np.nan)
        for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert point[name] == pytest.approx(table["1"][key])
            assert point[f"{name}_weighted"] == pytest.approx(table["weighted avg"][key])
            interval = point["intervals"][name]
            assert interval["estimate"] == pytest.approx(point[name]) and interval["low"] < interval["high"]


def test_the_threshold_is_devs_and_says_so(described):
    test, dev, report = described
    point = report["at_dev_threshold"]
    assert point["threshold"] == compute_youden_threshold(dev.label, dev.score)
    assert point["threshold"] != compute_youden_threshold(test.label, test.score)
    assert point["source"] == "Youden's J on dev (300 images, 60 positive)"
    assert report["at_0.5"]["source"] == "fixed"


def test_other_prevalences_are_the_reweighted_matrix_with_an_interval(described):
    point = described[2]["at_0.5"]
    for prevalence, values in point["at_prevalence"].items():
        exact = compute_metrics_at_prevalence(point["confusion_matrix"], float(prevalence))
        assert not {"recall", "specificity"} & values.keys() and {"precision", "npv", "accuracy"} <= values.keys()
        for name, value in ((name, exact[name]) for name in values):
            assert values[name]["estimate"] == pytest.approx(value)
            assert values[name]["low"] - 1e-9 <= value <= values[name]["high"] + 1e-9
    assert point["paper_like"]["num_negatives"] == 4 * point["paper_like"]["num_positives"]


def test_any_prevalence_can_be_stated():
    report = describe_classification(make_table(60, 20, 8), None, num_resamples=5, prevalences=(0.05,))
    assert list(report["at_0.5"]["at_prevalence"]) == ["0.05"]


def test_calibration_is_fitted_on_dev_and_measured_on_test(described):
    fits = described[2]["calibration"]
    shifted = make_table(500, 100, 0)
    shifted = PredictionTable(
        **(vars(shifted) | {"logit": shifted.logit + 3, "score": 1 / (1 + np.exp(-shifted.logit - 3))})
    )
    dev = make_table(300, 60, 1)
    moved = PredictionTable(**(vars(dev) | {"logit": dev.logit + 3, "score": 1 / (1 + np.exp(-dev.logit - 3))}))
    bad = describe_classification(shifted, moved, num_resamples=2)["calibration"]
    errors = {name: bad[name]["calibration_error"]["estimate"] for name in ("before", "platt")}
    assert errors["before"] > 0.3 > 0.1 > errors["platt"]
    losses = [scaled["platt"]["log_loss"]["estimate"] for scaled in (bad, fits)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Platt undoes the shift
    test = described[0]
    before = fits["before"]
    assert before["log_loss"]["estimate"] == pytest.approx(sklearn_metrics.log_loss(test.label, test.score))
    assert before["brier_score"] == {key: described[2]["brier_score"][key] for key in ("estimate", "low", "high")}
    for values in (before, fits["temperature"], fits["platt"]):
        assert values["log_loss"]["low"] < values["log_loss"]["estimate"] < values["log_loss"]["high"]
    assert bad["platt"]["bias"] < fits["platt"]["bias"] - 1
    assert "300 images" in fits["fitted_on"]


def test_strata_have_the_counts_and_values_of_their_images(described):
    test, _, report = described
    rows = {(row["by"], row["name"]): row for row in report["strata"]}
    chosen = test.attributes["view"] == "AP"
    row = rows["view", "AP"]
    assert (row["num_images"], row["num_positives"]) == (chosen.sum(), test.label[chosen].sum())
    assert row["num_patients"] == len(np.unique(test.patient[chosen]))
    assert row["auroc"]["estimate"] == pytest.approx(
        sklearn_metrics.roc_auc_score(test.label[chosen], test.score[chosen])
    )
    assert row["threshold"] == report["at_dev_threshold"]["threshold"]
    assert sum(row["num_images"] for (by, _), row in rows.items() if by == "age") == len(test)
    alone, others = rows["positives", "cardiomegaly alone"], rows["positives", "with other findings"]
    assert alone["num_positives"] + others["num_positives"] == 100
    assert alone["num_images"] - alone["num_positives"] == 400  # the negatives belong to both


def test_too_small_strata_say_so_and_give_no_number():
    views = np.array(["AP"] * 95 + ["PA"] * 205)
    table = make_table(300, 100, 3)
    table = PredictionTable(**(vars(table) | {"attributes": {"view": views}}))
    rows = {row["name"]: row for row in describe_classification(table, None, num_resamples=10)["strata"]}
    assert rows["AP"]["too_small"] and rows["PA"]["too_small"] == (rows["PA"]["num_positive_patients"] < MIN_PATIENTS)
    assert "auroc" not in rows["AP"] and rows["AP"]["num_negative_patients"] == 0


def test_without_dev_patients_and_attributes_there_is_less_and_it_is_named():
    table = make_table(200, 50, 4, patient=None, logit=None, attributes={})
    report = describe_classification(table, None, num_resamples=20)
    assert report["at_dev_threshold"] is None and report["calibration"] is None and report["strata"] == []
    assert "bootstrap over images" in report["interval_method"] and report["num_patients"] == 200


@pytest.mark.slow
def test_the_whole_test_list_takes_less_than_a_minute():
    start = time.perf_counter()
    report = describe_classification(make_table(10930, 1069, 5), make_table(5221, 171, 6))
    assert time.perf_counter() - start < 60
    assert report["num_images"] == 10930 and len(report["strata"]) > 8
