"""What the ratio says of a test split: against scikit-learn, its sentences, and agreement by its literal formulas."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxa_jax.agreement import AGREEMENT, compute_agreement, describe_agreement
from cxa_jax.errors import UserError
from cxa_jax.predictions import PredictionTable
from cxa_jax.ratio_metrics import describe_ratio
from cxa_jax.report_ratio import tabulate_ratio, write_ratio_lines
from cxa_jax.summary import _format_ratio

OPTIONS = {"num_resamples": 200, "seed": 0}


def draw_table(rng, num_images=160, effect=1.0):
    """Two images of each patient, of one class; views in turn; logits `effect` apart."""
    label = np.repeat(rng.random(num_images // 2) < 0.4, 2).astype(np.int32)
    logit = rng.normal(size=num_images) + effect * label
    patient = np.array([f"p{row // 2}" for row in range(num_images)])
    view = np.array(["AP", "PA"] * (num_images // 2))
    score = 1 / (1 + np.exp(-logit))
    return PredictionTable(
        np.array([f"i{row}" for row in range(num_images)]), label, score, patient, logit, {"view": view}
    )


def draw_ratios(rng, table, effect=0.05):
    return 0.45 + effect * table.label + rng.normal(0, 0.05, len(table))


def test_aurocs_are_scikit_learns():
    rng = np.random.default_rng()
    dev, test = draw_table(rng), draw_table(rng)
    ratios, dev_ratios = draw_ratios(rng, test), draw_ratios(rng, dev)
    ratios[3], dev_ratios[5] = np.nan, np.nan
    found = describe_ratio(test, ratios, dev, dev_ratios, **OPTIONS)
    fill = np.nanmedian(dev_ratios)
    filled, dev_filled = np.where(np.isnan(ratios), fill, ratios), np.where(np.isnan(dev_ratios), fill, dev_ratios)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(np.column_stack([dev.logit, dev_filled]), dev.label)
    both = model.predict_proba(np.column_stack([test.logit, filled]))[:, 1]
    for name, mask in (("all", np.ones(len(test), bool)), *((v, test.attributes["view"] == v) for v in ("AP", "PA"))):
        row = found["all"] if name == "all" else found["by_view"][name]
        scores = {"auroc": filled, "network": test.logit, "with_network": both}
        wanted = {key: roc_auc_score(test.label[mask], score[mask]) for key, score in scores.items()}
        for key, value in wanted.items():
            assert row[key]["estimate"] == pytest.approx(value) and row[key]["low"] < value < row[key]["high"]
        assert row["less_network"]["estimate"] == pytest.approx(wanted["auroc"] - wanted["network"])
        gain = wanted["with_network"] - wanted["network"]
        assert row["with_network_less_network"]["estimate"] == pytest.approx(gain)
    assert found["num_unread"] == 1 and found["coefficients"]["logit"] > 0
    assert found["median_ratio"]["positive"] == pytest.approx(np.nanmedian(ratios[test.label == 1]))


def stub_report(ratio):
    group = {"runs": ["mine"], "cardiothoracic_ratio": [ratio]}
    return {"groups": [group], "data": {"left_out": {}}}


@pytest.mark.parametrize("better", [True, False])
def test_a_ratio_that_beats_the_network_is_named(better):
    rng = np.random.default_rng(1)
    dev, test = draw_table(rng, effect=0.0 if better else 4.0), draw_table(rng, effect=0.0 if better else 4.0)
    ratios, dev_ratios = (draw_ratios(rng, table, 0.2 if better else 0.0) for table in (test, dev))
    error = describe_agreement([0.4, 0.5], [0.41, 0.49], None, **OPTIONS)
    ratio = describe_ratio(test, ratios, dev, dev_ratios, **OPTIONS)
    ratio |= {"source": "lines on paper", "reader": {"error": {"natural": {"ratio": error}}}}
    assert ratio["ratio_beats_network"] is better
    (line,) = _format_ratio(ratio)
    assert ("THE RATIO BEATS THE NETWORK" in line) is better and "AP: AUROC" in line and "fitted on drawings" in line
    table = tabulate_ratio(stub_report(ratio))
    assert [row[:2] for row in table.rows] == [["mine", "all"], ["mine", "AP"], ["mine", "PA"]]
    assert all(len(row) == len(table.head) for row in table.rows) and "lines on paper" in table.note
    assert table.rows[0][-1] == ("higher" if better else "lower")
    (card,) = write_ratio_lines(stub_report(ratio))
    assert ("IT BEATS THE NETWORK" in card) is better and "of mine" in card


def test_without_dev_nothing_is_joined_and_few_patients_get_no_number():
    rng = np.random.default_rng()
    test = draw_table(rng)
    ratios = draw_ratios(rng, test)
    for dev_ratios in (None, draw_ratios(rng, test)):
        one_class = dataclasses.replace(test, label=np.zeros_like(test.label))
        found = describe_ratio(test, ratios, one_class, dev_ratios, **OPTIONS)
        assert found["coefficients"] is None and "with_network" not in found["all"] and "auroc" in found["all"]
    one_view = dataclasses.replace(test, attributes={"view": np.full(len(test), "PA")})
    assert describe_ratio(one_view, ratios, test, ratios, **OPTIONS)["by_view"] == {}
    few = test.take(np.arange(12))
    found = describe_ratio(few, ratios[:12], test, ratios, **OPTIONS)
    assert found["all"]["too_small"] and not found["ratio_beats_network"] and "auroc" not in found["all"]
    found |= {
        "source": "",
        "reader": {"error": {"natural": {"ratio": describe_agreement([1, 2], [1, 3], None, **OPTIONS)}}},
    }
    assert (
        "too few patients" in _format_ratio(found)[0] and "too small" in tabulate_ratio(stub_report(found)).rows[0][4]
    )
    assert write_ratio_lines(stub_report(found)) == [] and _format_ratio(None) == []
    assert tabulate_ratio(stub_report(None)) is None
    blank = describe_ratio(test, np.full(len(test), np.nan), test, np.full(len(test), np.nan), **OPTIONS)
    assert blank["num_unread"] == len(test) and blank["all"]["auroc"]["estimate"] == 0.5


def test_agreement_is_its_formulas_on_repeated_images():
    rng = np.random.default_rng()
    truth = rng.normal(0.5, 0.1, 30)
    estimate = 0.8 * truth + rng.normal(0.08, 0.02, 30)
    counts = rng.integers(0, 4, 30)
    found = compute_agreement(estimate, truth, counts[None].astype(float))
    a, b = np.repeat(estimate, counts), np.repeat(truth, counts)
    bias, sd = np.mean(a - b), np.std(a - b, ddof=1)
    wanted = (np.mean(np.abs(a - b)), bias, sd, bias - 1.96 * sd, bias + 1.96 * sd, np.corrcoef(a, b)[0, 1])
    for name, value in zip(AGREEMENT, wanted, strict=True):
        assert found[name][0] == pytest.approx(value, rel=1e-9)


def test_agreement_counts_what_is_not_measured_and_takes_patients_for_units():
    rng = np.random.default_rng()
    truth = rng.normal(0.5, 0.1, 60)
    estimate = truth + np.repeat(rng.normal(0, 0.05, 15), 4)  # images of a patient err alike
    estimate[:2] = np.nan
    alone = describe_agreement(estimate, truth, None, **OPTIONS)
    found = describe_agreement(estimate, truth, np.repeat(np.arange(15), 4), **OPTIONS)
    assert (found["num_images"], found["num_patients"], found["num_unmeasured"]) == (58, 15, 2)
    width = {name: row["bias"]["high"] - row["bias"]["low"] for name, row in (("alone", alone), ("clustered", found))}
    assert width["clustered"] > 1.3 * width["alone"]
    nothing = describe_agreement([np.nan, 1.0], [1.0, 1.0], None, **OPTIONS)
    assert nothing["bias"] is None and nothing["num_images"] == 1
    with pytest.raises(UserError, match="not as many"):
        describe_agreement([1.0], [1.0, 2.0], None, **OPTIONS)
