"""What is told of the attention each epoch, against a slow twin and known maps; and that a run tells it."""

import csv

import numpy as np
import pytest
import tiny

from cxa_jax import epoch_end
from cxa_jax import run as run_module
from cxa_jax.attention_statistics import describe_attention, summarize_attention
from cxa_jax.metric_writer import write_history
from cxa_jax.progress import Progress


def test_numbers_are_those_of_a_slow_twin():
    rng = np.random.default_rng()
    z = rng.normal(0, 4, (30, 4, 4)).astype(np.float32)
    w = (1 / (1 + np.exp(-z))).astype(np.float32)
    p = w / w.sum((1, 2), keepdims=True)
    found = summarize_attention(z, w, p)
    ordered = np.sort(z.astype(np.float64).ravel())
    places = np.array([0.05, 0.5, 0.95]) * (len(ordered) - 1)
    expected = np.interp(places, np.arange(len(ordered)), ordered)
    assert [found[f"attention_z_p{q}"] for q in ("05", "50", "95")] == pytest.approx(expected.tolist())
    cells = [1 / sum(float(value) ** 2 for value in image.ravel()) for image in p]
    assert found["attention_cells"] == pytest.approx(sum(cells) / len(cells), rel=1e-5)
    saturated = sum(float(value) > 0.99 or float(value) < 0.01 for value in w.ravel()) / w.size
    assert 0 < saturated < 1 and found["attention_saturated"] == pytest.approx(saturated)


def test_one_cell_and_all_cells():
    one, flat = np.zeros((2, 3, 3)), np.full((2, 3, 3), 1 / 9)
    one[:, 1, 2] = 1
    assert summarize_attention(one, one, one)["attention_cells"] == 1
    assert summarize_attention(one, one, one)["attention_saturated"] == 1
    assert summarize_attention(flat, flat, flat)["attention_cells"] == pytest.approx(9)
    assert summarize_attention(flat, flat, flat)["attention_saturated"] == 0
    assert "9.0 of 9 cells in effect, 0% saturated" in describe_attention(summarize_attention(flat, flat, flat), 9)


@pytest.mark.parametrize("pooling", ["amm", "gap"])
def test_a_run_tells_them_of_dev_where_there_is_attention(tmp_path, monkeypatch, pooling):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    run = run_module.create_run(tiny.make_config(**{"model.pooling": pooling}))
    state = run.create_state()
    _, progress = epoch_end.end_epoch(run, state, Progress(epoch=1))
    write_history(tmp_path / "metrics.csv", progress.history)
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    told = {name: float(value) for name, value in row.items() if name.startswith("attention_")}
    assert bool(told) == (pooling == "amm")
    if told:
        dev = epoch_end.predict_dev(run, state.variables)
        np.testing.assert_allclose(1 / (1 + np.exp(-dev.attention_logits)), dev.attention, rtol=1e-5)
        assert told == summarize_attention(dev.attention_logits, dev.attention, dev.weights)
        assert dev.weights.sum((1, 2)) == pytest.approx(np.ones(13), rel=1e-5)
