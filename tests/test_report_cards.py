"""The first screen: its verdicts follow from the intervals."""

import pytest
from finished_runs import describe_short_cuts

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
            "pointing_above_median_box": interval(0.0),
            "pointing": interval(0.9),
            "box_pointing": interval(0.9),
            "energy_ratio": None,
        },
        "attention": {
            "mean_iou": interval(mean_iou),
            GAIN: interval(mean_iou - 0.64),
            "pointing_above_median_box": interval(-0.5),
            "iou_above_shuffled": interval(0.1),
            "pointing_above_shuffled": interval(0.2),
            "energy_ratio_above_shuffled": interval(0.3),
            "iou_above_mean_map": interval(0.0),
            "pointing_above_mean_map": None,
            "energy_ratio_above_mean_map": None,
            "pointing": interval(0.5),
            "box_pointing": interval(0.7),
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
        "short_cuts": [describe_short_cuts()],
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
        "cardiothoracic_ratio": [None],
    }
    other = group | {"name": "DenseNet121-GAP", "free": {"auroc": interval(0.7) | {"sd_over_seeds": float("nan")}}}
    data = {
        "num_images": 120, "num_positives": 20, "num_patients": 60, "num_positive_patients": 9,
        "interval_method": "95% by bootstrap over patients", "left_out": {},
    }  # fmt: skip
    return {"groups": [other, group], "baselines": [], "comparisons": [], "data": data}


BOX, MEAN, OTHER = "the median box of other patients", "its mean map of training images", "the map of another patient"


@pytest.mark.parametrize(
    ("mean_iou", "verdict"),
    [
        (0.2, f"better than {OTHER}, no better than {MEAN}, worse than {BOX}"),
        (0.65, f"better than {OTHER}, no better than {BOX} and {MEAN}"),
        (0.8, f"better than {BOX} and {OTHER}, no better than {MEAN}"),
    ],
)
def test_a_map_is_judged_against_its_controls_not_against_itself(mean_iou: float, verdict: str):
    where = write_cards(make_report(mean_iou))[2]
    assert where.answer == f"boxes of attention W overlap {verdict}"
    assert where.lines[0] == "CXA_Dense121, 85 boxed positives of 69 patients"
    assert where.lines[1] == (
        "boxes by half the maximum, largest component: attention W: mean IoU "
        f"{mean_iou:.3f} [{mean_iou - 0.02:.3f}, {mean_iou + 0.02:.3f}], box's centre in the true box 0.700 "
        "[0.680, 0.720]; paired differences:"
    )
    gain = mean_iou - 0.64
    assert where.lines[2].startswith(f"less {BOX}: mean IoU {gain:.3f} [") and "pointing -0.500" in where.lines[2]
    assert where.lines[3:5] == [
        f"less {MEAN}: mean IoU 0.000 [-0.020, 0.020]",
        f"less {OTHER}: mean IoU 0.100 [0.080, 0.120], pointing 0.200 [0.180, 0.220]",
    ]
    assert where.lines[5] == "A map that does not beat these has shown nothing."


def test_the_tuned_rule_answers_where_the_leading_map_has_it():
    report = make_report(0.2)
    part = report["groups"][0]["localization"]["all_boxed"]
    part["rules"]["phantom_tuned"] = make_report(0.8)["groups"][0]["localization"]["all_boxed"]["rules"]["half_max"]
    where = write_cards(report)[2]
    assert "boxes by a rule tuned on phantoms" in where.lines[1] and "mean IoU 0.800" in where.lines[1]
    assert not any("mean IoU 0.200" in line for line in where.lines)  # of half the maximum


def test_a_map_alone_is_judged_first_and_a_fitted_reader_beside_it():
    report = make_report(0.2)
    rules = report["groups"][0]["localization"]["all_boxed"]["rules"]
    metrics = {"mean_iou": interval(0.82), "pointing": interval(1.0), "box_pointing": interval(1.0)}
    gains = {"iou_above_thumbnail": interval(0.01), "pointing_above_thumbnail": interval(0.0)}
    gains |= {"energy_ratio_above_thumbnail": None}  # of a box
    rules["phantom_reader"] = {
        "attention": metrics | gains | {"energy_ratio": None},
        "all_maps": metrics | gains | {GAIN: interval(0.2), "pointing_above_median_box": interval(0.0)},
    }
    where = write_cards(report)[2]
    alone = f"boxes of attention W overlap better than {OTHER}, no better than {MEAN}, worse than {BOX}"
    assert (
        where.answer
        == f"{alone}; boxes of all maps together overlap better than {BOX}, no better than the image's thumbnail"
    )
    starts = [line for line in where.lines if line.startswith("boxes by")]
    assert [line.split(":")[1].strip() for line in starts] == ["attention W", "all maps together"]
    assert "fitted on phantoms" in starts[1] and "mean IoU 0.820" in starts[1] and "mean IoU 0.200" in starts[0]


def test_the_best_model_comes_first_and_errors_are_counted():
    good, sure, where, wrong = write_cards(make_report(0.2))
    assert good.answer == "AUROC 0.800 [0.780, 0.820], CXA_Dense121, the highest of 2 models on this test set"
    assert "DenseNet121-GAP: 0.700" in good.lines[0]
    assert "view, age alone, logistic regression: AUROC 0.700 [0.600, 0.800]" in "\n".join(good.lines)
    assert "heart greyed out: AUROC 0.700 [0.600, 0.800]" in good.lines[-1] and "14 patients" in good.lines[-1]
    assert any(line.startswith("energy of attention W in the median box") for line in where.lines)
    older = make_report(0.2)
    for group in older["groups"]:
        group["short_cuts"] = [None]
    assert not any("heart greyed" in line for line in write_cards(older)[0].lines)
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
