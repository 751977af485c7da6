"""A whole run with everything on: cut and resumed bit for bit, the rate it tells, and what it evaluates and keeps."""

import os
import signal

import jax
import numpy as np
import pytest
import tiny

from cxa_jax import epoch_end, figures, outputs, train
from cxa_jax import run as run_module
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.interruption import Interrupted, end_on_signal
from cxa_jax.progress import Progress

FIELDS = {
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 0.5,
    "optimizer.attention_rate_factor": 2.0,
    "optimizer.attention_weight_decay": 0.01,
    "optimizer.ema_decay": 0.8,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 3,
    "train.recompute_moments": 2,
    "train.num_epochs": 2,
}


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    monkeypatch.setattr(figures, "save_augmentation_grid", lambda run, path: None)


def read(run, folder, kind):
    with Checkpoints(folder, kind, read_only=True) as checkpoints:
        return checkpoints.restore(run.abstract_state)


def test_a_cut_run_with_everything_on_is_the_uncut_run_bit_for_bit(tmp_path, monkeypatch):
    """Cut inside the first epoch, and on the dev split when the moments are fitted already."""
    run = run_module.create_run(tiny.make_config(**FIELDS))
    for name in ("uncut", "cut"):
        (tmp_path / name).mkdir()
    train.train(run, tmp_path / "uncut", tmp_path / "uncut")
    fetch, evaluate_split, signals = train._fetch, epoch_end.evaluate_split, iter([signal.SIGTERM])

    def interrupting_fetch(run, state, progress, *rest):
        if progress.epoch_step == 2:
            for number in signals:
                os.kill(os.getpid(), number)
        return fetch(run, state, progress, *rest)

    def interrupting_evaluation(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate_split(*args, **kwargs)

    cut = tmp_path / "cut"
    monkeypatch.setattr(train, "_fetch", interrupting_fetch)
    with pytest.raises(Interrupted, match="SIGTERM"), end_on_signal():
        train.train(run, cut, cut)
    state, meta = read(run, cut, "latest")
    assert 0 < meta["progress"]["epoch_step"] < 6 and state.averaged_params
    monkeypatch.setattr(epoch_end, "evaluate_split", interrupting_evaluation)
    with pytest.raises(Interrupted, match="SIGINT"), end_on_signal():
        train.train(run, cut, cut)
    monkeypatch.setattr(epoch_end, "evaluate_split", evaluate_split)
    train.train(run, cut, cut)
    for kind in ("latest", "best"):
        (state, meta), (expected, expected_meta) = (read(run, tmp_path / name, kind) for name in ("cut", "uncut"))
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        assert meta["progress"] == expected_meta["progress"]
    assert (cut / "metrics.csv").read_bytes() == (tmp_path / "uncut/metrics.csv").read_bytes()
    assert run.train_step._cache_size() == run.eval_step._cache_size() == run.moments_step._cache_size() == 1
    # the rate told is that of each epoch's last step, and what is kept is the average with moments of its own
    progress = 1e-3 * 0.5 * (1 + np.cos(np.pi * (np.array([5, 11]) - 3) / (12 - 3)))
    np.testing.assert_allclose([row["learning_rate"] for row in meta["progress"]["history"]], progress, rtol=1e-5)
    kept, _ = outputs.restore_best(run, cut)
    state, meta = read(run, cut, "best")
    jax.tree.map(np.testing.assert_array_equal, kept["params"], state.averaged_params)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], state.fitted_stats)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), kept["params"], state.params)))
    (row,) = [row for row in meta["progress"]["history"] if row["step"] == int(state.step)]
    assert epoch_end.compute_loss(epoch_end.predict_dev(run, kept)) == row["dev_loss"]
    # an average that is asked for later starts at the weights as they are
    plain = run_module.create_run(tiny.make_config(**FIELDS | {"optimizer.ema_decay": 0.0}))
    with Checkpoints(tmp_path / "plain", "latest") as checkpoints:
        checkpoints.save(state.replace(averaged_params={}), {})
        without, _ = checkpoints.restore(plain.abstract_state)
        begun, _ = checkpoints.restore(run.abstract_state)
    assert not without.averaged_params
    jax.tree.map(np.testing.assert_array_equal, begun.averaged_params, state.params)


def test_only_the_plateau_s_schedule_follows_the_dev_loss():
    scales = {}
    for schedule in ("plateau", "constant"):
        config = tiny.make_config(**{"optimizer.plateau_patience": 1, "optimizer.schedule": schedule})
        progress = Progress()
        for step in range(3):
            progress = progress.end_epoch(0.5, step, {}, config.optimizer)
        scales[schedule] = progress.plateau.scale
    assert scales["constant"] == 1 and scales["plateau"] == pytest.approx(0.3**2)
