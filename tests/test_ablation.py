"""The ablation: which runs, resumed and reported how, and what stands in its table."""

import csv
import json

import fake_members
import numpy as np
import pytest
import tiny
from scipy.stats import bootstrap

from configs import common
from cxa_jax import ablation, ablation_plan
from cxa_jax import run as run_module
from cxa_jax.ablation_arms import Arm, find_references
from cxa_jax.ablation_member import SCORES, load_scores, measure_step_times, save_scores, train_member
from cxa_jax.ablation_table import describe_step, title_rows
from cxa_jax.errors import UserError
from cxa_jax.pooling import POOLINGS
from cxa_jax.predictions import read_predictions
from cxa_jax.seed_comparison import compare, sample_auroc


def make_config(**fields):
    config = tiny.make_config().unlock()
    config.ablation = common.ablation()
    config.ablation.update({"poolings": "amm,gap,gmp", "seeds": (0, 1), "num_parallel": 2})
    config.update_from_flattened_dict(fields)
    return config.lock()


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(ablation, "load_dataset", lambda config: tiny.make_dataset())
    monkeypatch.setattr(ablation, "train_member", fake_members.train)
    monkeypatch.setattr(ablation, "measure_step_times", fake_members.time_steps)
    monkeypatch.setattr(ablation, "find_platform", lambda: "cpu")


def count_calls(folder):
    return {path.parent.name: len(path.read_text().splitlines()) for path in folder.glob("*/calls.txt")}


def test_a_failed_run_is_named_and_the_rest_go_on_and_nothing_is_done_twice(fakes, tmp_path, caplog):
    (tmp_path / "refuse").touch()
    with pytest.raises(UserError, match=r"2 of 6 runs failed(?s:.*)gmp-seed0: .*console\.txt"):
        ablation.ablate(make_config(), str(tmp_path))
    assert "ValueError: this pooling is broken" in caplog.text
    assert set(count_calls(tmp_path)) == {"amm-seed0", "amm-seed1", "gap-seed0", "gap-seed1"}
    assert "gmp" not in (tmp_path / "ablation.md").read_text()
    (tmp_path / "refuse").unlink()
    report = ablation.ablate(make_config(), str(tmp_path))
    assert count_calls(tmp_path) == {f"{name}-seed{seed}": 1 for name in ("amm", "gap", "gmp") for seed in (0, 1)}
    assert json.loads((tmp_path / "ablation.json").read_text())["differences"].keys() == {"amm", "gap"}
    check_table(report, tmp_path)
    changed = make_config(**{"optimizer.learning_rate": 0.5, "ablation.seeds": (1,), "ablation.poolings": "gap"})
    ablation.ablate(changed, str(tmp_path))  # another config is another run: the stand-in does not refuse it
    assert count_calls(tmp_path)["gap-seed1"] == 2


def check_table(report, folder):
    runs = {
        name: [load_scores(folder / f"{name}-seed{seed}" / SCORES)[0] for seed in (0, 1)] for name in ("amm", "gap")
    }
    label, patient = runs["amm"][0]["label"], runs["amm"][0]["patient"]
    samples = [
        sample_auroc(label, [run["logit"] for run in runs[name]], patient, num_resamples=50) for name in ("amm", "gap")
    ]
    expected, got = compare(*samples), report["differences"]["gap"]["amm"]["auroc"]
    assert (got["estimate"], got["low"], got["high"]) == (expected.estimate, expected.low, expected.high)
    pointing = np.mean([run["weights/pointing"] - other["weights/pointing"] for run, other in zip(*runs.values())])  # noqa: B905
    assert report["differences"]["gap"]["amm"]["pointing"]["estimate"] == pytest.approx(pointing)
    assert report["poolings"]["amm"]["step_time"]["ratio"]["estimate"] == pytest.approx(1.1)
    assert report["data"]["num_boxed"] == fake_members.NUM_IMAGES // 2
    text = (folder / "ablation.md").read_text()
    assert text.index("AMM minus GAP (the same mlp head; AMM pools BN(F), GAP F)") < text.index("Difference to amm")
    assert "| control: image centre |" in text and "220 ms, 1.100 [1.100, 1.100] x gap" in text
    with (folder / "ablation.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["amm"]["auroc_minus_gap"]) == expected.estimate
    assert rows["image_centre"]["kind"] == "control" and rows["image_centre"]["energy_ratio"] == "nan"
    assert (folder / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "ablation.pdf").read_bytes()[:4] == b"%PDF"


def test_step_times_are_compared_within_each_round():
    rng = np.random.default_rng(4)
    load = rng.uniform(1, 5, 15)  # of the machine: it falls on both alike
    ratios = rng.normal(1.2, 0.05, 15)
    arms = [Arm("amm"), Arm("gap")]
    step = describe_step(arms[0], arms, {"seconds": {"gap": load.tolist(), "amm": (ratios * load).tolist()}})
    expected = bootstrap((ratios,), np.median, method="percentile", n_resamples=4000, random_state=rng)
    got = step["ratio"]
    assert got["estimate"] == pytest.approx(np.median(ratios)) and got["to"] == "gap"
    np.testing.assert_allclose((got["low"], got["high"]), expected.confidence_interval, atol=0.02)
    assert step["p50_s"] == pytest.approx(np.median(ratios * load))


def test_a_row_says_what_sets_it_apart_besides_the_pooling(fakes, tmp_path):
    fields = {"ablation.poolings": "gem,pcam,gap,amm", "ablation.seeds": (0,), "model.attended": "all_normalized"}
    report = ablation.ablate(make_config(**fields), str(tmp_path))
    assert title_rows(report["poolings"]) == {
        "gem": "gem (reads F)", "pcam": "pcam (linear head)", "gap": "gap", "amm": "amm",
    }  # fmt: skip
    text = (tmp_path / "ablation.md").read_text()
    assert "AMM minus GAP (the same mlp head; both pool BN(F))" in text
    assert "| gem (reads F) |" in text and "| gem (reads F) - gap |" in text


def test_runs_differ_in_pooling_and_seed_alone(tmp_path):
    config = make_config(**{"ablation.poolings": "all", "ablation.seeds": (3, 5)})
    members = ablation_plan.make_members(config, "chest_phantom", ablation_plan.read_plan(config), tmp_path)
    assert [member.name for member in members] == [f"{name}-seed{seed}" for seed in (3, 5) for name in POOLINGS]
    for member in members:
        own = member.config
        assert own.model.head == ("linear" if member.arm.pooling == "pcam" else "mlp")
        rest = own.copy_and_resolve_references().unlock()
        rest.model.pooling, rest.model.head, rest.seed, rest.name = "amm", "mlp", 0, "tiny"
        rest.data.name, rest.ablation = "auto", config.ablation
        assert rest.to_dict() == config.to_dict()


def test_strides_are_an_axis_and_each_pair_differs_in_one_thing(fakes, tmp_path):
    config = make_config(**{"ablation.poolings": "gap,amm,gmp", "ablation.strides": "32, 8", "ablation.seeds": (0, 1)})
    report = ablation.ablate(config, str(tmp_path))
    arms = [(pooling, stride) for pooling in ("gap", "amm", "gmp") for stride in (32, 8)]
    names = {(pooling, stride): f"{pooling}-stride{stride}" for pooling, stride in arms}
    assert set(count_calls(tmp_path)) == {f"{name}-seed{seed}" for name in names.values() for seed in (0, 1)}
    for (pooling, stride), name in names.items():
        own = report["poolings"][name]
        assert (own["pooling"], own["stride"], own["title"]) == (pooling, stride, f"{pooling}, stride {stride}")
        facts = load_scores(tmp_path / f"{name}-seed1" / SCORES)[1]["config"]
        assert (facts["model.pooling"], facts["model.stride"], facts["seed"]) == (pooling, stride, 1)
    pairs = {(reference, name) for reference, rows in report["differences"].items() for name in rows}
    expected = set()
    for a in arms:
        for b in arms:
            same_stride = a[1] == b[1] and a[0] != b[0] and a[0] in ("amm", "gap")
            if same_stride or (a[0] == b[0] and (a[1], b[1]) == (32, 8)):
                expected.add((names[a], names[b]))
    assert pairs == expected and len(pairs) == 2 * 2 * 2 + 3
    runs = [
        [load_scores(tmp_path / f"amm-stride{stride}-seed{seed}" / SCORES)[0] for seed in (0, 1)] for stride in (8, 32)
    ]
    pointing = np.mean(
        [fine["weights/pointing"] - coarse["weights/pointing"] for fine, coarse in zip(*runs, strict=True)]
    )
    got = report["differences"]["amm-stride32"]["amm-stride8"]["pointing"]["estimate"]
    assert got == pytest.approx(pointing) and abs(pointing) > 0.01
    assert report["poolings"]["amm-stride8"]["step_time"]["ratio"]["to"] == "gap-stride32"
    assert list(report["controls"]) == ["random_map-stride32", "random_map-stride8", "image_centre", "median_box"]
    controls = [report["controls"][f"random_map-stride{stride}"]["mean_iou"]["estimate"] for stride in (32, 8)]
    for stride, control in zip((32, 8), controls, strict=True):
        runs = [load_scores(tmp_path / f"gap-stride{stride}-seed{seed}" / SCORES)[0] for seed in (0, 1)]
        assert control == pytest.approx(np.mean([run["random_map/mean_iou"] for run in runs]))
    text = (tmp_path / "ablation.md").read_text()
    assert text.startswith("# Ablation of pooling and stride")
    assert "| amm, stride 8 - gap, stride 8 |" in text and "| control: random map, stride 8 |" in text
    assert (
        text.index("AMM minus GAP") < text.index("Difference to amm, stride 32:") < text.index("| amm, stride 8 - amm,")
    )
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"


def test_one_stride_is_compared_as_none():
    arms = [Arm(pooling) for pooling in ("gmp", "gap", "amm")]
    plain = {"amm": ["gmp", "gap"], "gap": ["gmp", "amm"]}
    for stride in (None, 8):
        own = [Arm(arm.pooling, stride) for arm in arms]
        found = {a.pooling: [b.pooling for b in compared] for a, compared in find_references(own).items()}
        assert found == plain and list(found) == list(plain)
    assert find_references([Arm("amm")]) == {}
    assert find_references([Arm("gmp", 16), Arm("gmp", 32), Arm("gmp", 8)]) == {
        Arm("gmp", 16): [Arm("gmp", 32), Arm("gmp", 8)]
    }


def test_rules_are_columns_and_new_ones_are_scored_without_another_ablation(fakes, tmp_path):
    config = make_config(**{"ablation.poolings": "amm,gap", "ablation.seeds": (0,)})
    ablation.ablate(config, str(tmp_path))
    config = make_config(**{"ablation.poolings": "amm,gap", "ablation.seeds": (0,), "ablation.rules": "otsu,half_max"})
    report = ablation.ablate(config, str(tmp_path))
    assert count_calls(tmp_path) == {"amm-seed0": 2, "gap-seed0": 2}  # the stand-in for: tested again
    ablation.ablate(config, str(tmp_path))
    assert count_calls(tmp_path) == {"amm-seed0": 2, "gap-seed0": 2}
    scores = load_scores(tmp_path / "amm-seed0" / SCORES)[0]
    for metric in ("mean_iou_otsu", "mean_iou"):
        assert report["poolings"]["amm"]["metrics"][metric]["estimate"] == pytest.approx(
            scores[f"weights/{metric}"].mean()
        )
        assert np.isfinite(report["differences"]["gap"]["amm"][metric]["low"])
        assert np.isfinite(report["controls"]["random_map"][metric]["estimate"])
    assert list(report["metrics"].values())[-2:] == ["mean IoU, otsu", "mean IoU, half_max"]
    assert "| mean IoU, otsu | mean IoU, half_max | step |" in (tmp_path / "ablation.md").read_text()


def test_a_run_older_than_a_field_had_its_default(fakes, tmp_path):
    config = make_config(**{"ablation.poolings": "amm", "ablation.seeds": (0,)})
    ablation.ablate(config, str(tmp_path))
    path = tmp_path / "amm-seed0" / SCORES
    columns, facts = load_scores(path)
    for name in ("model.stride", "data.strata"):
        del facts["config"][name]
    save_scores(path, columns, facts)
    ablation.ablate(config, str(tmp_path))
    assert count_calls(tmp_path) == {"amm-seed0": 1}
    facts["config"]["model.stride"] = 8
    save_scores(path, columns, facts)
    ablation.ablate(config, str(tmp_path))
    assert count_calls(tmp_path) == {"amm-seed0": 2}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("poolings", "amm,gab", "amm, softmax"),
        ("poolings", "", "needed is 'all' or some of"),
        ("poolings", "amm,gap,amm", "names one twice: amm, gap, amm"),
        ("seeds", (), "at least one whole number"),
        ("seeds", (0, -1), "at least one whole number"),
        ("seeds", (1, 1), "names one twice"),
        ("num_parallel", -1, "num_parallel=-1 must be at least 0"),
        ("strides", "32,half", "needed are strides in px"),
        ("strides", "0", "needed are strides in px"),
        ("strides", "8,8", "strides names one twice: 8, 8"),
        ("rules", "", "at least one threshold rule"),
        ("rules", "half_max,tightest", r"rules='half_max,tightest': unknown threshold rule.*tightest"),
        ("rules", "otsu,otsu", "rules names one twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        ablation_plan.read_plan(make_config(**{f"ablation.{field}": value}))


def test_every_form_of_a_rule_can_be_written():
    config = make_config(**{"ablation.rules": "half_max,0.3,p85_all"})
    assert ablation_plan.read_plan(config).rules == ("half_max", "0.3", "p85_all")


def test_a_field_that_cannot_be_meant_stops_all_runs_at_once(fakes, tmp_path):
    with pytest.raises(UserError, match=r"config\.train\.loss='mse'"):
        ablation.ablate(make_config(**{"train.loss": "mse"}), str(tmp_path))
    assert count_calls(tmp_path) == {}


def test_other_configs_have_no_such_section():
    with pytest.raises(UserError, match=r"use --config=configs/ablation\.py"):
        ablation_plan.read_plan(tiny.make_config())


@pytest.mark.slow
def test_a_member_is_the_main_job_and_its_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    config = tiny.make_config(**{"train.num_epochs": 1, "model.pooling": "gap"})
    train_member(config, str(tmp_path), ("half_max", "wang"))
    columns, facts = load_scores(tmp_path / SCORES)
    table = read_predictions(tmp_path / "predictions_test.csv")
    np.testing.assert_array_equal(columns["id"], table.id)
    np.testing.assert_allclose(columns["logit"], table.logit, rtol=1e-6)
    assert facts["best_epoch"] == 1 and facts["config"]["model.pooling"] == "gap"
    assert (tmp_path / "metrics.json").is_file()
    assert len(columns["boxed_patient"]) == columns["label"].sum() == len(columns["random_map/pointing"])
    # a constant p is chance: its energy is the box's share, its box the whole image
    np.testing.assert_allclose(columns["weights/energy_ratio"], 1, rtol=1e-6)
    np.testing.assert_allclose(columns["weights/mean_iou"], 24 * 24 / tiny.SIZE**2, rtol=1e-6)
    # nor is its box another by another rule: every pixel is at the maximum, above the two levels of 'wang'
    np.testing.assert_array_equal(columns["weights/mean_iou_wang"], columns["weights/mean_iou"])
    assert (columns["random_map/mean_iou_wang"] != columns["random_map/mean_iou"]).any()
    member = ablation_plan.Member(Arm("gap"), 0, config, tmp_path)
    assert member.is_finished("fingerprint0", ("half_max", "wang")) and member.count_epochs() == 1
    assert not member.is_finished("other", ("half_max",)) and not member.is_finished("fingerprint0", ("otsu",))
    train_member(config, str(tmp_path), ("otsu",))  # tested again, not trained again
    assert member.is_finished("fingerprint0", ("otsu",))
    assert load_scores(tmp_path / SCORES)[1]["wall_s"] < facts["wall_s"]
    measure_step_times({"gap": config}, str(tmp_path / "times.json"))
    seconds = json.loads((tmp_path / "times.json").read_text())["seconds"]["gap"]
    assert len(seconds) == 15 and min(seconds) > 0
