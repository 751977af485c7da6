"""What a config stands for: every pooling makes a run that can be described, and one that trains."""

import jax
import numpy as np
import pytest
import tiny

from cxa_jax import run as run_module
from cxa_jax.data.fake_xrays import make_fake_dataset
from cxa_jax.pooling import POOLINGS
from cxa_jax.predictions import read_predictions
from cxa_jax.run import create_run, describe_parameters
from cxa_jax.train import train_and_evaluate


def make_config(name, **fields):
    head = "linear" if name == "pcam" else "mlp"
    return tiny.make_config(**{"model.pooling": name, "model.head": head, **fields})


@pytest.mark.parametrize("attended", ["normalized", "all_normalized"])
@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_the_parts_of_a_network_add_up(name, attended):
    run = create_run(make_config(name, **{"model.attended": attended}), make_fake_dataset(tiny.SIZE, 8))
    lines = [line.replace(",", "").split() for line in describe_parameters(run.abstract_state).splitlines()]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))]
    sizes.append(sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.batch_stats)))
    assert [int(number) for number in lines[-1][2:]] == sizes
    assert sum(int(line[1]) for line in lines[1:-1]) == sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_every_pooling_runs_the_main_job(name, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    report = train_and_evaluate(make_config(name, **{"train.num_epochs": 1}), str(tmp_path))
    assert np.isfinite(read_predictions(tmp_path / "predictions_test.csv").logit).all()
    assert report["config"]["model.pooling"] == name
    assert (tmp_path / "test_attention.png").is_file() and (tmp_path / "localization_test.csv").is_file()
