"""The paper's printed values, against the specification's text, and the intervals put on them."""

import itertools
import math
import re

import numpy as np
import pytest
from conftest import REAL

from configs import dense121
from cxa_jax import paper_tables
from cxa_jax.model_names import BACKBONE_NAMES, name_backbone, name_model, name_run
from cxa_jax.prevalence import TABLE_4
from cxa_jax.workdir import flatten_config

SPECIFICATION = REAL.parent / "PAPER.md"


def _specification() -> str:
    if not SPECIFICATION.is_file():
        pytest.skip(f"the specification is not here: {SPECIFICATION}")
    return SPECIFICATION.read_text()


def test_table_5_is_the_printed_one():
    text = _specification().split("**Table 5**")[1].split("**Figures**")[0]
    found = re.findall(r"([A-Za-z0-9_]+(?:-GAP)?) (\.\d\d)/(\.\d\d)/(\.\d\d)/(\.\d\d)", text)
    printed = {name: paper_tables.AverageRow(*map(float, values)) for name, *values in found}
    assert len(printed) == 8 and printed == paper_tables.TABLE_5


def test_table_4_is_the_printed_one():
    text = _specification().split("**Table 4**")[1].split("**Table 5**")[0]
    triple = r"(\.\d\d)/(\.\d\d)/(\.\d\d)"
    found = re.findall(rf"(CXA_\w+) {triple} \| {triple} \| {triple} \| ([\d.]+) %", text)
    assert {name for name, *_ in found} == set(TABLE_4)
    for name, *numbers in found:
        values, row = [float(number) for number in numbers], TABLE_4[name]
        assert (*row.negative, *row.positive, *row.weighted) == tuple(values[:9])
        assert row.accuracy == pytest.approx(values[9] / 100)


def test_the_interval_of_the_printed_auroc_is_the_known_one():
    low, high = paper_tables.compute_hanley_mcneil_interval(0.89, 1069, 9861)
    assert (round(low, 3), round(high, 3)) == (0.877, 0.903)
    assert paper_tables.find_paper_intervals("CXA_Dense121")["auroc"] == (0.89, low, high)


def test_intervals_hold_the_printed_value_and_are_of_binomial_width():
    intervals = paper_tables.find_paper_intervals("CXA_Dense121")
    for value, low, high in intervals.values():
        assert low < value < high
    value, low, high = intervals["recall"]
    half = 1.96 * math.sqrt(0.73 * 0.27 / 1069) + paper_tables.HALF_UNIT
    assert (high - low) / 2 == pytest.approx(half, abs=0.002) and value == 0.73


def test_gap_models_have_no_interval_but_for_auroc_and_unknown_ones_nothing():
    gap = paper_tables.find_paper_intervals("DenseNet121-GAP")
    assert np.isfinite(gap["auroc"]).all() and math.isnan(gap["f1_weighted"][1])
    assert paper_tables.judge(0.7, *gap["f1_weighted"][1:]) == "no interval"
    assert paper_tables.find_paper_intervals("densenet121-gap-mlp") == {}


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.88, "inside"), (0.87, "below"), (0.91, "above"), (math.nan, "no interval")]
)
def test_a_value_is_judged_against_the_interval(value: float, verdict: str):
    assert paper_tables.judge(value, 0.877, 0.903) == verdict


def test_models_have_the_papers_names():
    names = {
        name_model(backbone, pooling, head, 32, "cut")
        for backbone in BACKBONE_NAMES
        for pooling, head in (("amm", "mlp"), ("gap", "linear"))
    }
    assert names == set(paper_tables.TABLE_5)
    assert name_model("densenet121", "gap", "mlp", 32, "cut") == "DenseNet121-gap-mlp"


def test_no_other_stride_has_a_name_of_the_papers():
    """A row of the paper is found by a name's first word."""
    names = set()
    for backbone, (pooling, head), stride, by in itertools.product(
        BACKBONE_NAMES, (("amm", "mlp"), ("gap", "linear"), ("gap", "mlp")), (16, 8), ("cut", "dilate")
    ):
        name = name_model(backbone, pooling, head, stride, by)
        assert paper_tables.find_paper_intervals(name.split(" ")[0]) == {}
        names.add(name)
    assert len(names) == 48
    assert {"CXA_Dense121/8", "CXA_Dense121/8 dilated", "DenseNet121/16-GAP", "ResNet50/8-gap-mlp dilated"} < names


def test_runs_are_named_by_their_configs():
    config = flatten_config(dense121.get_config("stride8"))
    assert (name_run(config), name_backbone(config)) == ("CXA_Dense121/8", "densenet121/8")
    config |= {"model.stride_by": "dilate", "model.pooling": "gap", "model.head": "linear"}
    assert (name_run(config), name_backbone(config)) == ("DenseNet121/8-GAP dilated", "densenet121/8 dilated")
    older = {"model.backbone": "resnet50", "model.pooling": "amm", "model.head": "mlp"}
    assert (name_run(older), name_backbone(older)) == ("CXA_Res50", "resnet50")


def test_only_the_whole_test_list_is_comparable():
    assert paper_tables.is_official_test_set(10930, 1069)
    assert not paper_tables.is_official_test_set(480, 115)
