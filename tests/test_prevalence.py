"""Re-weighted metrics, paper-like subsamples, and the check of the paper's tables."""

import itertools
import math

import numpy as np
import pytest
from quick import slow

from cxa_jax import prevalence
from cxa_jax.classification import describe_threshold
from cxa_jax.errors import UserError
from cxa_jax.metrics import compute_confusion_matrix, compute_confusion_metrics
from cxa_jax.predictions import PredictionTable


def test_reweighting_equals_copies_of_images():
    confusion = np.array([[80, 20], [3, 7]])
    values = prevalence.compute_metrics_at_prevalence(confusion, 0.5)
    copied = compute_confusion_metrics(confusion * [[1], [10]])
    assert values == pytest.approx({name: float(value) for name, value in copied.items()})


def test_reweighting_to_the_own_prevalence_changes_nothing_and_never_tpr_or_fpr():
    confusion = [[8678, 1183], [289, 780]]
    own = prevalence.compute_metrics_at_prevalence(confusion, 1069 / 10930)
    assert own == pytest.approx({name: float(value) for name, value in compute_confusion_metrics(confusion).items()})
    fifth = prevalence.compute_metrics_at_prevalence(confusion, 0.2)
    assert fifth["tpr"] == pytest.approx(own["tpr"]) and fifth["fpr"] == pytest.approx(own["fpr"])
    assert fifth["precision"] == pytest.approx(0.2 * fifth["tpr"] / (0.2 * fifth["tpr"] + 0.8 * fifth["fpr"]))
    assert fifth["precision"] > own["precision"] + 0.1


def test_reweighting_without_a_class_is_undefined_and_silly_shares_are_refused():
    assert all(math.isnan(v) for v in prevalence.compute_metrics_at_prevalence([[3, 1], [0, 0]], 0.2).values())
    with pytest.raises(UserError, match="prevalence is 20"):
        prevalence.compute_metrics_at_prevalence([[3, 1], [1, 1]], 20)


def test_paper_like_metrics_are_those_of_one_positive_in_five():
    rng = np.random.default_rng(1)
    labels = (np.arange(4000) < 300).astype(int)
    scores = 1 / (1 + np.exp(-rng.normal(2 * labels - 1)))
    values = prevalence.compute_paper_like_metrics(labels, scores, 0.5, num_subsamples=100)
    exact = prevalence.compute_metrics_at_prevalence(compute_confusion_matrix(labels, scores, 0.5), 0.2)
    for name in ("precision", "f1", "accuracy", "npv", "f1_weighted"):
        assert values[name]["mean"] == pytest.approx(exact[name], abs=0.005), name
        assert values[name]["low"] <= values[name]["mean"] <= values[name]["high"]
    assert values["recall"]["sd"] == pytest.approx(0, abs=1e-12)  # all positives are in every subsample
    assert (values["num_positives"], values["num_negatives"]) == (300, 1200)
    assert values == prevalence.compute_paper_like_metrics(labels, scores, 0.5, num_subsamples=100)


def test_paper_like_metrics_draw_positives_where_negatives_are_few():
    labels = np.array([1] * 30 + [0] * 40)
    values = prevalence.compute_paper_like_metrics(labels, np.linspace(1, 0, 70), num_subsamples=5)
    assert (values["num_positives"], values["num_negatives"]) == (10, 40)
    assert values["auroc"] == {"mean": 1, "sd": 0, "low": 1, "high": 1}
    with pytest.raises(UserError, match="there are 2 and 3"):
        prevalence.compute_paper_like_metrics([1, 1, 0, 0, 0], np.full(5, 0.5))


@pytest.mark.parametrize("model", sorted(prevalence.TABLE_4))
def test_no_confusion_matrix_of_the_stated_test_set_fits_table_4(model: str):
    row = prevalence.TABLE_4[model]
    assert len(prevalence.find_feasible_confusion_matrices(row)) == 0
    implied = prevalence.compute_implied_prevalence(row.positive[0], row.positive[1], 1 - row.negative[1])
    assert 0.19 <= implied <= 0.205


def test_rows_of_table_4_fit_a_one_to_four_subsample():
    fits = [
        len(prevalence.find_feasible_confusion_matrices(row, 4 * 1069, 1069)) for row in prevalence.TABLE_4.values()
    ]
    assert max(fits) > 0


def _printed(matrix: np.ndarray) -> prevalence.PrintedRow:
    values = compute_confusion_metrics(matrix)
    triple = [
        tuple(round(float(values[name + suffix]), 2) for name in ("precision", "recall", "f1"))
        for suffix in ("_negative", "", "_weighted")
    ]
    return prevalence.PrintedRow(*triple, accuracy=float(values["accuracy"]))


def test_the_search_finds_exactly_the_matrices_that_print_alike():
    row = _printed(np.array([[51, 9], [7, 23]]))
    found = {tuple(matrix.ravel()) for matrix in prevalence.find_feasible_confusion_matrices(row, 60, 30)}
    expected = set()
    for tn, tp in itertools.product(range(61), range(31)):
        values = compute_confusion_metrics([[tn, 60 - tn], [30 - tp, tp]])
        printed = [("_negative", row.negative), ("", row.positive)]
        if all(
            abs(values[name + suffix] - value) <= 0.005 + 1e-9
            for suffix, triple in printed
            for name, value in zip(("precision", "recall", "f1"), triple, strict=True)
        ):
            expected.add((tn, 60 - tn, 30 - tp, tp))
    assert (51, 9, 7, 23) in found and found == expected
    weighted = prevalence.find_feasible_confusion_matrices(row, 60, 30, check_weighted=True)
    assert (51, 9, 7, 23) in {tuple(matrix.ravel()) for matrix in weighted} and len(weighted) <= len(found)


@pytest.mark.parametrize(("tpr", "fpr"), [(0.6, 0.005), slow(0.6, 0.02), slow(0.05, 0.005), slow(0.7, 0.1)])
def test_precision_and_npv_at_another_prevalence_are_covered(tpr, fpr):
    """60 positives, 200 negatives at a prevalence of .0327: percentiles covered 62 % where false positives are rare."""
    rng, covered, num_known, share = np.random.default_rng(5), np.zeros(2), 0, 0.0327
    labels, ids = np.r_[np.ones(60, int), np.zeros(200, int)], np.arange(260).astype(str)
    truth = [
        prevalence.compute_metrics_at_prevalence([[1 - fpr, fpr], [1 - tpr, tpr]], share)[name]
        for name in ("precision", "npv")
    ]
    for _ in range(150):
        scores = np.where(rng.random(260) < np.where(labels == 1, tpr, fpr), 0.9, 0.1)
        if not np.any(scores > 0.5):
            continue
        num_known += 1
        table = PredictionTable(ids, labels, scores)
        found = describe_threshold(table, 0.5, "fixed", (share,), num_resamples=100, seed=0)["at_prevalence"][
            f"{share:g}"
        ]
        for index, name in enumerate(("precision", "npv")):
            assert 0 <= found[name]["low"] <= found[name]["estimate"] <= found[name]["high"] <= 1
            covered[index] += found[name]["low"] <= truth[index] <= found[name]["high"]
    assert np.all(covered >= 0.9 * num_known), covered / num_known


def test_a_perfect_test_is_not_sure_at_a_low_prevalence():
    labels = np.r_[np.ones(60, int), np.zeros(200, int)]
    table = PredictionTable(np.arange(260).astype(str), labels, labels * 0.8 + 0.1)
    found = describe_threshold(table, 0.5, "fixed", (0.03,), num_resamples=100, seed=0)["at_prevalence"]["0.03"]
    assert found["precision"]["estimate"] == 1 and found["precision"]["low"] < 0.65
    assert found["f1"]["estimate"] == 1 and found["f1"]["low"] < 0.8
