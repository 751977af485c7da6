"""Whole runs of a tiny network: resume after real kills, NaN, one compilation, refusals, what is left behind."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from conftest import QUICK_FLAGS, compiles_quickly

from cxa_jax import epoch_end, figures, train
from cxa_jax import run as run_module
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.errors import UserError
from cxa_jax.interruption import Interrupted, end_on_signal
from cxa_jax.outputs import evaluate
from cxa_jax.progress import Progress

PROGRAM = pathlib.Path(tiny.__file__)


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)  # `uncut` draws; it takes seconds


def test_a_picture_that_cannot_be_drawn_ends_the_run_with_its_epoch_saved_and_is_drawn_by_the_next(
    tmp_path, monkeypatch
):
    def fail(run, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(figures, "save_augmentation_grid", fail)
    config = tiny.make_config(**{"train.num_epochs": 1})
    with pytest.raises(OSError, match="No space left.*augmentation.png"):
        train.train_and_evaluate(config, str(tmp_path))
    assert read_arrays(tmp_path, "latest")[1]["progress"]["epoch"] == 1
    drawn = []
    monkeypatch.setattr(figures, "save_augmentation_grid", lambda run, path: drawn.append(path.name))
    train.train_and_evaluate(config, str(tmp_path))
    assert drawn == ["augmentation.png"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, pytestconfig):
    """A run that nobody cut, in a process of its own as the cut ones are, compiled as this process compiles."""
    workdir = tmp_path_factory.mktemp("uncut")
    assert run_program(workdir, flags=QUICK_FLAGS if compiles_quickly(pytestconfig) else "").returncode == 0
    return workdir


def run_program(workdir, *arguments, devices=1, flags=""):
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(PROGRAM), f"--workdir={workdir}", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read_arrays(workdir, kind):
    run = run_module.create_run(tiny.make_config())
    with Checkpoints(workdir, kind) as checkpoints:
        state, meta = checkpoints.restore(run.abstract_state)
    return jax.device_get(state), meta


def assert_same_run(a, b):
    for kind in ("latest", "best"):
        (state_a, meta_a), (state_b, meta_b) = read_arrays(a, kind), read_arrays(b, kind)
        jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
        assert meta_a["progress"] == meta_b["progress"]
    for name in ("metrics.csv", "predictions_dev.csv", "predictions_test.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.slow  # test_chaos.py kills the real command, at places that are worse
@pytest.mark.parametrize("kills", [(4, 1, 7), (0,), (16,)], ids=str)
def test_killed_run_equals_uncut_run(uncut, tmp_path, kills):
    """18 steps in all, 6 an epoch; each number is how many steps a process survives."""
    for kill in kills:
        cut = run_program(tmp_path, f"--kill_at_step={kill}", "--checkpoint_every_steps=2")
        assert cut.returncode == -signal.SIGKILL, cut.stderr[-2000:]
    ended = run_program(tmp_path, "--checkpoint_every_steps=2")
    assert ended.returncode == 0, ended.stderr[-2000:]
    if kills != (0,):
        assert "resuming" in ended.stderr
    assert_same_run(uncut, tmp_path)


@pytest.mark.slow  # test_sharding.py has the step
def test_run_on_eight_devices_ends_and_agrees(uncut, tmp_path):
    """The whole road sharded; test_sharding.py has the exact comparison of the steps."""
    ended = run_program(tmp_path, "--num_epochs=1", devices=8)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "devices: 8 x" in ended.stderr
    one, eight = (next(csv.DictReader((folder / "metrics.csv").open())) for folder in (uncut, tmp_path))
    assert float(eight["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=1e-2)  # float32, six steps


def test_workdir_holds_everything(uncut):
    names = {path.name for path in uncut.iterdir()}
    assert names >= {
        "config.json",
        "environment.json",
        "log.txt",
        "input_statistics.json",
        "metrics.csv",
        "metrics.json",
        "predictions_dev.csv",
        "predictions_test.csv",
        "augmentation.png",
        "augmentation.pdf",
        "box_readers.npz",
        "localization_test.csv",
        "maps_test.npz",
        "training_curves.png",
        "test_attention.png",
        "tensorboard",
        "checkpoints",
    }
    assert not [name for name in names if name.endswith(".tmp")]
    with (uncut / "predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == tiny.make_dataset().splits["test"].index["id"].tolist()
    report = json.loads((uncut / "metrics.json").read_text())
    assert report["phantom"] is True
    assert report["test"]["num_images"] == len(rows)
    assert 0 <= report["test"]["auroc"]["estimate"] <= 1
    with (uncut / "metrics.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    best = min(history, key=lambda row: float(row["dev_loss"]))
    assert report["checkpoint"]["step"] == int(best["step"])


def test_best_checkpoint_scores_as_its_epoch_did(uncut):
    """The state that is tested is the one of the lowest dev loss, not the last."""
    config = tiny.make_config()
    report = evaluate(config, str(uncut))
    history = list(csv.DictReader((uncut / "metrics.csv").open()))
    best = min(history, key=lambda row: float(row["dev_loss"]))
    assert report["dev"]["auroc"]["estimate"] == pytest.approx(float(best["dev_auroc"]))


@pytest.mark.slow  # 25 epochs
def test_training_learns_something(tmp_path):
    config = tiny.make_config(**{"train.num_epochs": 25, "optimizer.learning_rate": 0.03, "augment.shift": 0.0})
    report = train.train_and_evaluate(config, str(tmp_path))
    assert report["test"]["auroc"]["estimate"] > 0.9


def test_nothing_recompiles_after_the_first_step(tmp_path, monkeypatch):
    runs = []
    create_run = train.create_run
    monkeypatch.setattr(train, "create_run", lambda config: runs.append(create_run(config)) or runs[0])
    config = tiny.make_config(**{"optimizer.plateau_patience": 1, "optimizer.plateau_min_delta": 10.0})
    train.train_and_evaluate(config, str(tmp_path))
    rates = {row["learning_rate"] for row in csv.DictReader((tmp_path / "metrics.csv").open())}
    assert len(rates) > 1  # the rate changed, and still:
    assert runs[0].train_step._cache_size() == 1
    assert runs[0].eval_step._cache_size() == 1


def test_other_config_or_data_is_refused(tmp_path, monkeypatch):
    train.train_and_evaluate(tiny.make_config(**{"train.num_epochs": 1}), str(tmp_path))
    before = (tmp_path / "metrics.csv").read_bytes()
    changed = {"optimizer.learning_rate": 0.5, "train.num_epochs": 2}
    with pytest.raises(UserError, match="config.optimizer.learning_rate: 0.01 -> 0.5"):
        train.train_and_evaluate(tiny.make_config(**changed), str(tmp_path))
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset(seed=5))
    with pytest.raises(UserError, match="data fingerprint"):
        train.train_and_evaluate(tiny.make_config(**{"train.num_epochs": 2}), str(tmp_path))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    train.train_and_evaluate(tiny.make_config(**changed, **{"train.resume_changed": True}), str(tmp_path))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_a_changed_function_forgets_the_best_state(tmp_path):
    """Its dev loss is another function's; a changed rate keeps it."""
    run = run_module.create_run(tiny.make_config())
    iterator = make_train_iterator(run.dataset.splits["train"], run.config.data, batch_size=8, seed=0)
    progress = dataclasses.replace(Progress(epoch=1), best_loss=0.1, best_step=6)
    with train.BackgroundSaves(tmp_path) as saves:
        saves.save(run.create_state(), train.make_meta(run, progress, iterator))
        saves.wait()
        for field, value, kept in (
            ("model.attention_bound", 3.0, False),
            ("model.attended", "raw", False),
            ("optimizer.learning_rate", 0.5, True),
        ):
            changed = run_module.create_run(tiny.make_config(**{field: value, "train.resume_changed": True}))
            _, resumed, _ = train.start_or_resume(changed, tmp_path, saves.latest, saves.best)
            assert (resumed.best_step, resumed.best_loss) == ((6, 0.1) if kept else (-1, np.inf)), field


def test_nan_stops_with_step_rate_and_ids_and_keeps_the_last_good_state(tmp_path):
    config = tiny.make_config(**{"optimizer.learning_rate": 1e30})
    with pytest.raises(UserError) as caught:
        train.train_and_evaluate(config, str(tmp_path))
    message = str(caught.value)
    assert "learning rate 1e+30" in message
    assert "step" in message and message.count("train0") == 8
    run = run_module.create_run(config)
    with Checkpoints(tmp_path, "latest") as latest:
        state, meta = latest.restore(run.abstract_state)
    assert f"step {int(state.step)} " in message
    assert meta["progress"]["epoch_step"] == int(state.step)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_a_signal_saves_the_step_and_the_run_goes_on_bit_for_bit(uncut, tmp_path, monkeypatch):
    """The first signal comes inside an epoch, the second while dev is predicted."""
    config, evaluate_split = tiny.make_config(), epoch_end.evaluate_split
    fetch, signals = train._fetch, iter([signal.SIGTERM])

    def interrupting_fetch(run, state, progress, *rest):
        if progress.epoch_step == 2:
            for number in signals:
                os.kill(os.getpid(), number)
        return fetch(run, state, progress, *rest)

    def interrupting_evaluation(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate_split(*args, **kwargs)

    monkeypatch.setattr(train, "_fetch", interrupting_fetch)
    with pytest.raises(Interrupted, match="SIGTERM"), end_on_signal():
        train.train_and_evaluate(config, str(tmp_path))
    assert read_arrays(tmp_path, "latest")[1]["progress"]["epoch_step"] == 4  # one was on the device, one more follows
    monkeypatch.setattr(epoch_end, "evaluate_split", interrupting_evaluation)
    with pytest.raises(Interrupted, match="SIGINT"), end_on_signal():
        train.train_and_evaluate(config, str(tmp_path))
    _, meta = read_arrays(tmp_path, "latest")
    assert meta["progress"]["epoch_step"] == 6 and meta["progress"]["epoch"] == 0
    monkeypatch.setattr(epoch_end, "evaluate_split", evaluate_split)
    train.train_and_evaluate(config, str(tmp_path))
    assert_same_run(uncut, tmp_path)


def test_a_lost_latest_is_gone_on_from_the_best_and_a_lost_best_is_said(uncut, tmp_path, caplog):
    shutil.copytree(uncut, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/latest")
    train.train_and_evaluate(tiny.make_config(), str(tmp_path / "run"))
    assert "going on from the best state" in caplog.text
    for name in ("metrics.csv", "predictions_test.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (uncut / name).read_bytes()
    shutil.copytree(uncut, tmp_path / "other")  # its latest state knows which one was the best
    steps = sorted((tmp_path / "other/checkpoints/best").iterdir(), key=lambda path: int(path.name))
    if len(steps) == 2:  # else the first epoch was the best
        shutil.rmtree(steps[1])
        train.train_and_evaluate(tiny.make_config(), str(tmp_path / "other"))
        assert f"the state of the lowest dev loss, of step {steps[1].name}, is lost" in caplog.text


def test_the_newer_of_latest_and_best_is_gone_on_from(uncut, tmp_path, caplog):
    """A run killed between writing the two: the epoch that was the best so far is not trained again."""
    shutil.copytree(uncut, tmp_path / "run")
    newest = max(int(path.name) for path in (tmp_path / "run/checkpoints/best").iterdir())
    for path in (tmp_path / "run/checkpoints/latest").iterdir():
        if int(path.name) >= newest:
            shutil.rmtree(path)
    train.train_and_evaluate(tiny.make_config(), str(tmp_path / "run"))
    assert f"going on from the best state, of step {newest}" in caplog.text
    assert (tmp_path / "run/metrics.csv").read_bytes() == (uncut / "metrics.csv").read_bytes()


def test_a_full_device_says_which_batch_was_tried(tmp_path, monkeypatch):
    create_run = train.create_run

    def create_full(config):
        run = create_run(config)
        return dataclasses.replace(run, train_step=jax.jit(lambda *_: jax.numpy.ones((2**48,))))

    monkeypatch.setattr(train, "create_run", create_full)
    with pytest.raises(UserError, match=r"(?s)batch_size=8 in 1 part.*accumulate_steps=2.*RESOURCE_EXHAUSTED"):
        train.train_and_evaluate(tiny.make_config(), str(tmp_path))


def test_evaluate_says_that_the_data_are_others(uncut, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset(seed=5))
    with pytest.raises(UserError, match="data fingerprint: fingerprint0 -> fingerprint5"):
        evaluate(tiny.make_config(), str(uncut))


def test_evaluate_at_another_size(uncut, monkeypatch):
    sizes = []

    def load(config):
        sizes.append(config.image_size)
        return tiny.make_dataset(size=config.image_size)

    monkeypatch.setattr(run_module, "load_dataset", load)
    before = (uncut / "metrics.json").read_bytes()
    report = evaluate(tiny.make_config(**{"eval.image_size": 96}), str(uncut))
    assert sizes == [64, 96] and report["image_size"] == 96
    assert (uncut / "eval_96/predictions_test.csv").exists()
    assert (uncut / "metrics.json").read_bytes() == before


def test_evaluate_without_training_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(tiny.make_config(), str(tmp_path))
