"""--mode=report: one page, one JSON file and the figures, on two seeds, a GAP run and a foreign file."""

import base64
import csv
import dataclasses
import html.parser
import json
import pathlib
import re
import time

import numpy as np
import pytest
from finished_runs import write_run
from sklearn import metrics as sklearn_metrics

from cxa_jax.comparison import compute_delong_test
from cxa_jax.errors import UserError
from cxa_jax.predictions import read_predictions
from cxa_jax.report import write_report
from cxa_jax.report_figures import compute_roc_band
from cxa_jax.report_numbers import group_results
from cxa_jax.report_tables import TABLE_5_METRICS, format_interval, format_p, tabulate_paper
from cxa_jax.results import load_results

GAP = {"model.pooling": "gap", "model.head": "linear"}
FIGURES = (
    "fig5_confusion", "fig6_roc", "fig7_attention", "fig8_attention", "fig9_evidence", "reliability", "strata",
    "overlap", "learning_curves", "worst_CXA_Dense121", "worst_DenseNet121_GAP", "boxes_CXA_Dense121",
    "boxes_DenseNet121_GAP",
)  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / f"cxa{seed}", seed=seed) for seed in (0, 1)]
    runs.append(write_run(root / "gap0", seed=0, effect=0.8, config=GAP))
    with (runs[0] / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = "id,label,score\n" + "".join(f"{r['id']},{r['label']},{n * 37 % 100 / 100}\n" for n, r in enumerate(rows))
    (root / "theirs.csv").write_text(text)
    return [*map(str, runs), str(root / "theirs.csv")]


@pytest.fixture(scope="module")
def folder(paths, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(paths, str(folder))
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_runs_are_grouped_by_model_and_their_seeds_combined(report, paths):
    assert [group["name"] for group in report["groups"]] == ["CXA_Dense121", "DenseNet121-GAP", "theirs"]
    assert report["groups"][0]["runs"] == ["cxa0", "cxa1"] and report["groups"][0]["seeds"] == [0, 1]
    for group, members in zip(report["groups"], (paths[:2], paths[2:3], paths[3:]), strict=True):
        tables = [read_predictions(p if p.endswith("csv") else f"{p}/predictions_test.csv") for p in members]
        auroc = [sklearn_metrics.roc_auc_score(table.label, table.score) for table in tables]
        ap = [sklearn_metrics.average_precision_score(table.label, table.score) for table in tables]
        assert group["free"]["auroc"]["values"] == pytest.approx(auroc)
        assert group["free"]["auroc"]["estimate"] == pytest.approx(np.mean(auroc))
        assert group["free"]["average_precision"]["estimate"] == pytest.approx(np.mean(ap))
        recall = [np.mean(table.score[table.label == 1] >= 0.5) for table in tables]
        assert group["at_0.5"]["recall"]["estimate"] == pytest.approx(np.mean(recall))


def test_one_run_has_the_interval_of_its_metrics(report, paths):
    own = json.loads(pathlib.Path(paths[2], "metrics.json").read_text())["test"]["auroc"]
    shown = report["groups"][1]["free"]["auroc"]
    assert (shown["low"], shown["high"]) == pytest.approx((own["low"], own["high"]))


def test_each_two_models_are_compared(report, paths):
    pairs = {(pair["a"], pair["b"]): pair for pair in report["comparisons"]}
    assert len(pairs) == 3
    gap, theirs = read_predictions(f"{paths[2]}/predictions_test.csv"), read_predictions(paths[3])
    expected = compute_delong_test(gap.label, gap.score, theirs.score)
    assert pairs["DenseNet121-GAP", "theirs"]["delong"]["p_value"] == pytest.approx(expected.p_value)
    assert pairs["DenseNet121-GAP", "theirs"]["bootstrap"]["estimate"] == pytest.approx(expected.difference.estimate)


class _Page(html.parser.HTMLParser):
    """Collects what could reach outside, the text, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.text, self.open_tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "link", "br"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_answers_first(folder):
    page = _Page()
    text = (folder / "report.html").read_text()
    page.feed(text)
    assert not page.open_tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    words = "".join(page.text)
    places = [words.index(q) for q in ("How good?", "How sure?", "Where does it look?", "What went wrong?")]
    assert places == sorted(places) and places[-1] < words.index("All models, without a threshold")
    assert words.upper().count("CHEST PHANTOM") > 5 and "not comparable (phantoms)" in words
    assert "control: median box of the other patients" in words and "Youden" in words
    assert "attention W: percentile 85, one box about all components; control: the image's thumbnail: edges at" in words
    assert "its mean map of training images: edges at" not in words  # rules of maps' own controls would bury them
    assert "control: the image's thumbnail" in words and "less the image's thumbnail: mean IoU" in words


def test_every_figure_is_there_twice_and_on_the_page(folder):
    text = (folder / "report.html").read_text()
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert names == set(FIGURES)
    for name in FIGURES:
        png, pdf = ((folder / "figures" / f"{name}.{end}").read_bytes() for end in ("png", "pdf"))
        assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
        assert base64.b64encode(png[:300]).decode()[:390] in text


def test_runs_that_differ_in_more_than_the_seed_are_not_combined(paths, tmp_path):
    other = write_run(tmp_path / "fast", seed=2, config={"optimizer.learning_rate": 0.3})
    groups = group_results(load_results([*paths[:2], str(other)]))
    assert [group.name for group in groups] == [
        "CXA_Dense121 (learning_rate 0.01)", "CXA_Dense121 (learning_rate 0.3)"
    ]  # fmt: skip
    longer = write_run(tmp_path / "long", seed=2, config={"train.num_epochs": 99})
    assert len(group_results(load_results([*paths[:2], str(longer)]))) == 2
    elsewhere = write_run(tmp_path / "elsewhere", seed=2)
    metrics = json.loads((elsewhere / "metrics.json").read_text()) | {"fingerprint": "other data"}
    (elsewhere / "metrics.json").write_text(json.dumps(metrics))
    assert len(group_results(load_results([*paths[:2], str(elsewhere)]))) == 2
    same = write_run(tmp_path / "again", seed=0)
    with pytest.raises(UserError, match="cxa0, again are the same model with the same seed"):
        group_results(load_results([paths[0], str(same)]))


def test_runs_tested_otherwise_are_not_combined_and_names_say_what_differs(paths):
    first, second = load_results(paths[:2])

    def group_with(**fields):
        config = second.config | {"seed": 2} | fields
        other = dataclasses.replace(second, name="other", metrics=second.metrics | {"config": config})
        return [group.name.removeprefix("CXA_Dense121") for group in group_results([first, second, other])]

    assert group_with() == [""]
    assert group_with(**{"eval.num_copies": 5}) == [" (num_copies 1)", " (num_copies 5)"]
    assert group_with(**{"eval.levels_run": "runs/a"}) == [" (levels_run none)", " (levels_run runs/a)"]
    assert group_with(**{"model.kernel_init": "he_normal"}) == [
        " (kernel_init glorot_uniform)", " (kernel_init he_normal)"
    ]  # fmt: skip


def test_the_band_of_a_curve_holds_it_even_where_scores_are_yes_or_no(tmp_path):
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 200)
    answer = np.where(rng.random(200) < 0.8, label, 1 - label)
    lines = [f"i{n},{a},p{n},{b}" for n, (a, b) in enumerate(zip(label, answer, strict=True))]
    (tmp_path / "yes_no.csv").write_text("id,label,patient,score\n" + "\n".join(lines) + "\n")
    (group,) = group_results(load_results([str(tmp_path / "yes_no.csv")]))
    mean, low, high = compute_roc_band(group, seed=0)
    assert (low <= mean + 1e-12).all() and (mean <= high + 1e-12).all() and high[0] < 0.01


def test_predictions_files_alone_make_a_report_and_undefined_is_no_zero(tmp_path):
    rng = np.random.default_rng(9)
    for name in ("a", "b"):
        lines = [f"i{n},1,p{n // 2},{score:.3f}" for n, score in enumerate(rng.random(30))]
        (tmp_path / f"{name}.csv").write_text("id,label,patient,score\n" + "\n".join(lines) + "\n")
    files = [str(tmp_path / f"{name}.csv") for name in ("a", "b")]
    write_report(files, str(tmp_path / "report"))
    report = json.loads((tmp_path / "report/report.json").read_text(), parse_constant=pytest.fail)
    assert report["phantom"] is False and report["data"]["num_patients"] == 15
    assert report["groups"][0]["free"]["auroc"]["estimate"] is None  # one class
    assert report["comparisons"][0]["delong"] is None
    assert 0 < report["groups"][0]["at_0.5"]["recall"]["estimate"] < 1


def make_group(auroc: float) -> dict:
    values = {"estimate": auroc, "low": auroc - 0.01, "high": auroc + 0.01}
    like = {name: {"mean": 0.85} for name in TABLE_5_METRICS}
    point = dict.fromkeys(TABLE_5_METRICS, values)
    runs = [{"at_0.5": {"paper_like": like}}]
    return {"name": "CXA_Dense121", "free": {"auroc": values}, "at_0.5": point, "per_run": runs}


@pytest.mark.parametrize(("auroc", "verdict"), [(0.88, "inside"), (0.86, "below"), (0.91, "above")])
def test_values_on_the_official_list_are_judged_against_the_papers_interval(auroc, verdict):
    official = {"num_images": 10930, "num_positives": 1069}
    report = {"phantom": False, "data": official, "groups": [make_group(auroc)]}
    rows = {row[1]: row for row in tabulate_paper(report, TABLE_5_METRICS, "Table 5").rows}
    assert rows["AUROC"][4:] == ["0.89", "[0.877, 0.903]", verdict]
    assert rows["recall weighted"][6] == "inside" and rows["recall weighted"][3] == "0.850"
    subset = report | {"data": {"num_images": 480, "num_positives": 115}}
    (row,) = tabulate_paper(subset, ("auroc",), "Table 5").rows
    assert row[6] == "not comparable (480 of 10,930 test images)"


def test_numbers_as_text():
    assert format_interval({"estimate": 0.8912, "low": 0.1, "high": 0.99999}) == "0.891 [0.100, 1.000]"
    assert format_interval({"estimate": None, "low": None, "high": None}) == "-" == format_interval(None)
    assert [format_p(p) for p in (0.0002, 0.04, None)] == ["< 0.001", "0.040", "-"]


@pytest.mark.slow
def test_a_report_on_the_whole_test_list_takes_less_than_two_minutes(tmp_path):
    rng = np.random.default_rng(3)
    label = (np.arange(10930) < 1069).astype(int)
    patient = np.where(label == 1, rng.integers(0, 338, 10930), 1000 + np.arange(10930) // 4)
    for name in "abcd":
        score = 1 / (1 + np.exp(-rng.normal(size=10930) - 1.7 * label))
        rows = zip(range(10930), label, patient, score, rng.choice(["AP", "PA"], 10930), strict=True)
        lines = [f"i{i:05d},{y},{p},{s:.6f},{view}" for i, y, p, s, view in rows]
        (tmp_path / f"{name}.csv").write_text("id,label,patient,score,view\n" + "\n".join(lines) + "\n")
    start = time.perf_counter()
    report = write_report([str(tmp_path / f"{name}.csv") for name in "abcd"], str(tmp_path / "report"))
    assert time.perf_counter() - start < 120
    assert len(report["comparisons"]) == 6 and report["data"]["num_positives"] == 1069
