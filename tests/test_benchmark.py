"""--mode=benchmark: it measures training's own step, says under which conditions, and its numbers are consistent."""

import json

import jax
import numpy as np
import pytest
import tiny

from cxa_jax import benchmark as benchmark_module
from cxa_jax import measurements
from cxa_jax.benchmark import benchmark, format_table
from cxa_jax.data.fake_xrays import make_fake_dataset, prepare_fake_split
from cxa_jax.errors import UserError
from cxa_jax.hlo import ANALYSIS_ONLY
from cxa_jax.run import create_run
from cxa_jax.timing import measure_matmul, peak_host_bytes, process_age, summarize, time_calls
from cxa_jax.workdir import LOCK_FILE


def make_config(**fields):
    return tiny.make_config(**{"benchmark.num_steps": 3, "benchmark.num_warmup": 1, **fields})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    returned = benchmark(make_config(), str(folder))
    written = json.loads((folder / "benchmark.json").read_text())
    assert written["results"].keys() == returned["results"].keys()
    assert {path.name for path in folder.iterdir()} == {"benchmark.json", LOCK_FILE}
    return written


def test_times_and_rates_agree(report):
    results = report["results"]
    for values in (results["train"], results["pipeline_and_step"]):
        assert 0 < values["p50_s"] <= values["p95_s"]
        assert values["images_per_s"] == pytest.approx(8 / values["p50_s"])
    one, sixteen = results["inference"]["batch_1"], results["inference"]["batch_16"]
    assert one["images_per_s"] == pytest.approx(1 / one["p50_s"])
    assert sixteen["images_per_s"] == pytest.approx(16 / sixteen["p50_s"])
    start = results["start"]
    assert start["to_first_step_s"] > start["trace_s"] + start["compile_s"] > 0
    arithmetic = results["arithmetic"]
    assert arithmetic["flops_per_s"] == pytest.approx(arithmetic["flops"] / results["train"]["p50_s"])
    assert 0 < arithmetic["share_of_matmul_peak"] < 1
    assert 0 <= results["pipeline_and_step"]["device_wait_share"] < 1
    assert results["pipeline"]["images_per_cpu_s"] > 0


def test_traffic_that_nobody_counts_is_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_module, "count_traffic", lambda *_: None)
    results = benchmark(make_config(), str(tmp_path))["results"]
    assert "memory traffic              XLA does not tell" in format_table(results)


def test_arithmetic_is_the_networks_own_whatever_computes_it():
    """Not what is computed twice to save memory, nor what a faster graph adds."""
    counts = {
        benchmark_module._count_flops(create_run(make_config(**fields), make_fake_dataset(tiny.SIZE, 8)))
        for fields in ({}, {"model.implementation": "fused"}, {"train.remat": True}, {"train.accumulate_steps": 2})
    }
    assert len(counts) == 1 and counts.pop() > 1e6


def test_conditions_are_recorded(report):
    conditions = report["conditions"]
    assert conditions["commit"] and conditions["time"] and conditions["devices"]
    assert conditions["packages"]["jax"] == jax.__version__
    assert len(conditions["host"]["load_average"]) == 3
    assert conditions["host"]["usable_cores"] >= 1
    assert report["config"]["train.batch_size"] == 8


def test_table_names_every_measurement(report):
    table = format_table(report["results"])
    for what in (
        "first step",
        "compile",
        "train step",
        "host memory",
        "matrix product",
        "batch 1 ",
        "batch 16",
        "alone",
    ):
        assert what in table
    assert f"{report['results']['train']['images_per_s']:,.1f} images/s" in table


@pytest.mark.slow
def test_largest_batch_fits_and_a_larger_one_does_not():
    run = create_run(make_config(), make_fake_dataset(tiny.SIZE, 8))
    compiled = measurements.lower_train_step(run, 8).compile(ANALYSIS_ONLY)
    largest = measurements.find_largest_batch(run, 2**26, compiled)
    assert largest["tried"][largest["batch_size"]] <= largest["memory_bytes"] == 2**26
    larger = measurements.lower_train_step(run, int(1.1 * largest["batch_size"]) + 1).compile(ANALYSIS_ONLY)
    memory = larger.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes > 2**26


def test_no_batch_fits_in_next_to_nothing():
    run = create_run(make_config(), make_fake_dataset(tiny.SIZE, 8))
    compiled = measurements.lower_train_step(run, 8).compile(ANALYSIS_ONLY)
    largest = measurements.find_largest_batch(run, 2**20, compiled)
    assert largest["batch_size"] == 0 and len(largest["tried"]) == 2


def test_the_step_lowered_is_the_one_that_runs():
    """Same program text as a call of the jitted step with real arrays gives."""
    run = create_run(make_config(), make_fake_dataset(tiny.SIZE, 16))
    state, batch = run.create_state(), measurements.make_step_batch(run)
    rate_scale = jax.device_put(np.float32(1), measurements.replicated(run.mesh))
    called = run.train_step.lower(state, batch, rate_scale, run.root_key).as_text()
    assert measurements.lower_train_step(run, 8).as_text() == called
    assert batch.keys() == {"image", "label", "mask"} and batch["image"].dtype == np.uint8


def test_a_map_for_each_finding_has_its_labels_in_the_step():
    run = create_run(make_config(**{"model.labels": "findings"}), make_fake_dataset(tiny.SIZE, 8))
    batch = measurements.make_step_batch(run)
    assert batch["findings"].shape[0] == 8 and np.asarray(batch["findings"]).any()
    measurements.lower_train_step(run, 16)


def test_fake_records_read_back(tmp_path):
    split, memory = prepare_fake_split(tmp_path, 40, 6), make_fake_dataset(40, 6).splits["train"]
    assert len(split.source) == 6
    for row in range(6):
        np.testing.assert_array_equal(split.read_image(row), memory.read_image(row))
    assert split.index["label"].tolist() == [0, 1] * 3
    assert len(np.unique(split.read_image(0))) > 100


def test_unusable_configs_are_refused(tmp_path):
    for field, value in {"train.batch_size": 0, "data.image_size": -5, "benchmark.num_steps": 0}.items():
        with pytest.raises(UserError, match=f"config.{field}={value}"):
            benchmark(tiny.make_config(**{field: value}), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK_FILE}


def test_clocks():
    calls = []
    seconds = time_calls(lambda: calls.append(1), num_calls=4, num_warmup=3)
    assert len(seconds) == 4 and len(calls) == 7
    assert summarize(np.array([1.0, 2.0, 3.0]), 6)["images_per_s"] == 3
    assert 0 < process_age() < 10**6
    assert peak_host_bytes() > 10 * 2**20


def test_matrix_product_has_a_believable_rate(monkeypatch):
    monkeypatch.setattr("cxa_jax.timing.MATMUL_SIDE", {"cpu": 256})
    run = create_run(make_config(), make_fake_dataset(tiny.SIZE, 8))
    assert 1e8 < measure_matmul(run.mesh, "float32") < 1e15
