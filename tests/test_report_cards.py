"""The first screen: its verdicts follow from the intervals."""

import pytest

from cxa_jax.localization_table import GAIN
from cxa_jax.report_cards import write_cards
from cxa_jax.report_tables import describe_difference


def interval(estimate: float, half: float = 0.02) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half}


def make_stratum(view: str, num_images: int, num_patients: int, auroc: float) -> dict:
    counts = {"num_images": num_images, "num_patients": num_patients}
    return {"by": "view", "name": view, "too_small": False, "auroc": interval(auroc)} | counts


def make_report(mean_iou: float, auroc: float = 0.8) -> dict:
    maps = {
        "evidence": {  # of a higher score, and not asked
            "mean_iou": interval(0.95),
            GAIN: interval(0.31),
            "pointing": interval(0.9),
            "energy_ratio": None,
        },
        "attention": {
            "mean_iou": interval(mean_iou),
            GAIN: interval(mean_iou - 0.64),
            "pointing": interval(0.5),
            "energy_ratio": interval(1.0),
        },
        "median_box": {"mean_iou": interval(0.64), "pointing": interval(1.0)},
        "image_centre": {"pointing": interval(0.97)},
        "random_weights_attention": {"mean_iou": interval(0.99), "pointing": interval(0.1)},
    }
    part = {"num_images": [85], "num_patients": 69, "rules": {"half_max": maps}}
    point = {"threshold": 0.4, "source": "Youden's J on dev", "confusion_matrix": [[90, 10], [7, 13]]}
    group = {
        "name": "CXA_Dense121",
        "runs": ["a"],
        "free": {"auroc": interval(auroc) | {"sd_over_seeds": float("nan")}},
        "at_0.5": {"recall": interval(0.6), "specificity": interval(0.9)},
        "per_run": [{"at_dev_threshold": point, "at_0.5": point, "calibration_error": interval(0.2)}],
        "strata": [
            {"by": "view", "name": "AP", "too_small": False, "auroc": interval(0.7)}
            | {"num_images": 50, "num_patients": 40},
            {"by": "view", "name": "PA", "too_small": False, "auroc": interval(0.9)}
            | {"num_images": 70, "num_patients": 45},
            {"by": "age", "name": "0-17", "too_small": True},
        ],
        "localization": {"all_boxed": part},
    }
    other = group | {"name": "DenseNet121-GAP", "free": {"auroc": interval(0.7) | {"sd_over_seeds": float("nan")}}}
    data = {
        "num_images": 120, "num_positives": 20, "num_patients": 60, "num_positive_patients": 9,
        "interval_method": "95% by bootstrap over patients",
    }  # fmt: skip
    return {"groups": [other, group], "baselines": [], "comparisons": [], "data": data}


@pytest.mark.parametrize(("mean_iou", "verdict"), [(0.2, "worse than"), (0.65, "no better than"), (0.8, "better than")])
def test_a_map_is_judged_against_the_constant_box_not_against_itself(mean_iou: float, verdict: str):
    where = write_cards(make_report(mean_iou))[2]
    assert where.answer == f"attention W overlaps {verdict} a box that sees no image"
    assert "85 boxed positives of 69 patients" in where.lines[0] and "[0.620, 0.660]" in where.lines[0]
    assert f"difference, paired {mean_iou - 0.64:.3f}" in where.lines[0]


def test_the_best_model_comes_first_and_errors_are_counted():
    good, sure, _, wrong = write_cards(make_report(0.2))
    assert good.answer == "AUROC 0.800 [0.780, 0.820], CXA_Dense121, the highest of 2 models on this test set"
    assert "DenseNet121-GAP: 0.700" in good.lines[0]
    assert "0.040 wide, by bootstrap over patients" in sure.answer and "120 test images, 20 positive" in sure.lines[0]
    assert wrong.answer == "7 of 20 positives missed, 10 of 100 negatives called positive"
    assert (
        wrong.lines[1].startswith("AUROC view AP: 0.700") and "50 images of 40 patients" in wrong.lines[1]
    )  # the worst stratum first, too small ones left out


def test_a_difference_is_named_only_where_its_interval_leaves_out_zero():
    assert describe_difference(interval(0.01)) == "no difference shown"
    assert describe_difference(interval(0.05)) == "higher" and describe_difference(interval(-0.05)) == "lower"
    assert describe_difference({"estimate": float("nan"), "low": float("nan"), "high": float("nan")}) == "undefined"


def test_few_boxed_patients_get_no_verdict():
    report = make_report(0.2)
    for group in report["groups"]:
        group["localization"] = {"all_boxed": group["localization"]["all_boxed"] | {"num_patients": 2}}
    assert write_cards(report)[2].answer == "unknown: boxes of 2 patients are too few"
