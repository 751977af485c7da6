"""Recomputed moments: those of a pass in double precision over the epoch's own batches, read wherever they count."""

import dataclasses
import json
import logging
import pathlib
import re
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_run
import tiny
from quick import initialize, jit, slow

from cxa_jax import epoch_end, figures, outputs, train
from cxa_jax import run as run_module
from cxa_jax.checkpointing import Checkpoints
from cxa_jax.data.augment import normalize_images, to_rgb
from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.models import CardioXAttentionNet
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet
from cxa_jax.moments import fit_moments
from cxa_jax.progress import Progress
from cxa_jax.steps import make_moments_step
from cxa_jax.trained_network import load_trained_network
from cxa_jax.workdir import check_same_run, flatten_config

NUM_STEPS = 6  # of an epoch of the tiny run


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset(size=config.image_size))
    monkeypatch.setattr(figures, "save_augmentation_grid", lambda run, path: None)


def make_run(**fields):
    return run_module.create_run(tiny.make_config(**fields))


def batches_of(run, epoch, number):
    """The images of an epoch's first batches, found by going through all steps before them."""
    iterator = make_train_iterator(run.dataset.splits["train"], run.config.data, batch_size=8, seed=run.config.seed)
    return [next(iterator)["image"] for _ in range(NUM_STEPS * epoch + number)][NUM_STEPS * epoch :]


def literal_moments(model, variables, batches):
    """Mean and population variance of what each nn.BatchNorm is given, by float64 passes of the plain graph."""

    def read_inputs(variables, images):
        seen = {}

        def note(call, arguments, options, context):
            if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
                seen["/".join(context.module.path)] = arguments[0]
            return call(*arguments, **options)

        with nn.intercept_methods(note):
            model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        return seen

    moments = {}
    shared = isinstance(model.backbone, InceptionResNetV2)  # whose blocks of one kind are one inner function
    with jax.enable_x64(True), jax.disable_jit(shared):
        read_inputs = read_inputs if shared else jit(read_inputs)
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        for batch in batches:
            images = to_rgb(normalize_images(np.asarray(batch, np.float64), "min_max"), "min_max")
            for path, values in read_inputs(variables, images).items():
                values = np.asarray(values)
                assert values.dtype == np.float64
                mean = values.mean((0, 1, 2))
                moments.setdefault(path, []).append((mean, values.var((0, 1, 2)) + mean**2))
    means = {path: np.mean([mean for mean, _ in of], axis=0) for path, of in moments.items()}
    return {path: (means[path], np.mean([s for _, s in of], axis=0) - means[path] ** 2) for path, of in moments.items()}


def assert_equal_moments(found, expected):
    found = jax.tree_util.tree_flatten_with_path(found)[0]
    assert len(found) == 2 * len(expected)
    for path, values in found:
        *norm, kind = (key.key for key in path)
        np.testing.assert_allclose(values, expected["/".join(norm)][kind == "var"], rtol=2e-3, atol=1e-4, err_msg=path)


def test_moments_are_those_of_one_pass_in_double_precision():
    seed = int(np.random.default_rng().integers(1000))
    run = make_run(**{"seed": seed, "model.implementation": "fused"})
    state = run.create_state()
    epoch, number = 1, 4
    fitted = fit_moments(run, state.variables, epoch, number)
    assert fitted["params"] is state.params
    plain = CardioXAttentionNet(tiny.BACKBONES["tiny"](dtype=jnp.float64))
    expected = literal_moments(plain, state.variables, batches_of(run, epoch, number))
    assert len(jax.tree.leaves(state.batch_stats)) == 2 * len(expected)
    assert_equal_moments(fitted["batch_stats"], expected)
    assert run.moments_step._cache_size() == 1
    # fewer batches, another epoch and other weights give others; more than there are give the epoch's
    for other in (fit_moments(run, state.variables, epoch, 3), fit_moments(run, state.variables, 0, number)):
        differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), other["batch_stats"], fitted["batch_stats"])
        assert min(jax.tree.leaves(differences)) > 0
    whole, more = (fit_moments(run, state.variables, epoch, n)["batch_stats"] for n in (NUM_STEPS, 1000))
    jax.tree.map(np.testing.assert_array_equal, whole, more)
    assert run.moments_step._cache_size() == 1


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (ResNet((1, 1), implementation="fused"), {"pooling": "gap", "attended": "all_normalized"}),
        slow(InceptionResNetV2((1, 1, 1), implementation="fused"), {}),
    ],
)
def test_so_are_those_of_other_backbones_and_poolings(backbone, options):
    rng = np.random.default_rng()
    batches = [rng.integers(0, 256, (3, 96, 96, 1)).astype(np.uint8) for _ in range(3)]
    model = CardioXAttentionNet(backbone, **options)
    variables = dict(initialize(model, jax.random.key(rng.integers(1000)), jnp.zeros((1, 96, 96, 3))))
    step, moments = jit(make_moments_step(model, "min_max")), jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for number, batch in enumerate(batches):
        moments = step(variables["params"], moments, np.float32(number), batch)
    plain = model.clone(backbone=backbone.clone(implementation="plain", dtype=jnp.float64))
    assert_equal_moments(moments, literal_moments(plain, variables, batches))


def test_no_reader_is_left_behind():
    run = make_run()
    variables = run.create_state().variables
    fit_moments(run, variables, 0, 1)
    before = threading.active_count()
    for epoch in range(5):
        fit_moments(run, variables, epoch, 2)
    assert threading.active_count() <= before + 1  # the last one's may be ending


def test_a_run_without_new_options_has_the_state_it_had():
    run = make_run()
    state = run.create_state()
    assert not state.averaged_params and not state.fitted_stats
    assert state.variables["batch_stats"] is state.batch_stats and state.variables["params"] is state.params
    parts = {jax.tree_util.keystr(path[:1]) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]}
    assert parts == {".step", ".healthy", ".params", ".batch_stats", ".opt_state"}


def train_and_read(run, folder, kind="latest"):
    train.train(run, folder, folder)
    with Checkpoints(folder, kind, read_only=True) as checkpoints:
        return checkpoints.restore(run.abstract_state)


def test_dev_test_and_predict_read_the_recomputed_moments(tmp_path, caplog):
    fields = {"train.recompute_moments": 3, "train.num_epochs": 1}
    run = make_run(**fields)
    with caplog.at_level(logging.INFO):
        state, meta = train_and_read(run, tmp_path)
    (row,) = meta["progress"]["history"]
    assert "with recomputed moments" in caplog.text and "lag behind" not in caplog.text
    assert row["dev_loss_running_moments"] != row["dev_loss"]
    expected = fit_moments(run, {"params": state.params, "batch_stats": state.batch_stats}, 0, 3)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, state.fitted_stats, expected)
    differ = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.fitted_stats, state.batch_stats)
    assert all(jax.tree.leaves(differ))
    tested, _ = outputs.restore_best(run, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tested, state.variables)
    (tmp_path / "config.json").write_text(run.config.to_json_best_effort())
    predicting = load_trained_network(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, predicting.variables, state.variables)
    # another run takes over the pair; its own running moments start there
    other = make_run(**{"init.run": str(tmp_path)}).create_state()
    jax.tree.map(np.testing.assert_array_equal, other.batch_stats["backbone"], expected["backbone"])
    # and the run goes on with running moments alone, and back
    for number in (0, 2):
        changed = make_run(**fields | {"train.recompute_moments": number, "train.resume_changed": True})
        with train.BackgroundSaves(tmp_path) as saves:
            resumed, _, _ = train.start_or_resume(changed, tmp_path, saves.latest, saves.best)
        jax.tree.map(np.testing.assert_array_equal, resumed.batch_stats, state.batch_stats)
        assert bool(resumed.fitted_stats) == bool(number)


def test_running_moments_that_lag_are_warned_of_once_in_a_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(epoch_end, "TOLERATED", -1)
    run = make_run(**{"train.num_epochs": 1})
    train.train(run, tmp_path, tmp_path)
    _, meta = train_and_read(make_run(**{"train.num_epochs": 2}), tmp_path)
    first, second = meta["progress"]["history"]
    assert caplog.text.count("running moments lag behind") == 1
    assert caplog.text.count("--config.train.recompute_moments=") == 1
    assert first["dev_loss_recomputed_moments"] != first["dev_loss"]
    assert "dev_loss_recomputed_moments" not in second


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (1e-4, True)])
def test_moments_lag_where_the_dev_loss_is_a_fifth_off(caplog, scale, warned):
    run = make_run()
    state = run.create_state()
    fitted = fit_moments(run, state.variables, 0, epoch_end.NUM_CHECKED)
    state = state.replace(batch_stats=jax.tree.map(lambda leaf: leaf * scale, fitted["batch_stats"]))
    dev_loss = epoch_end.compute_loss(epoch_end.predict_dev(run, state.variables))
    row = epoch_end.compare_moments(run, state, dev_loss)
    off = abs(dev_loss / row["dev_loss_recomputed_moments"] - 1)
    assert (off > 0.2) == warned == ("running moments lag behind" in caplog.text), off


def test_a_loss_that_is_no_number_is_said_to_lag(caplog):
    run = make_run()
    state = run.create_state()
    epoch_end.compare_moments(run, state, float("nan"))
    assert "running moments lag behind" in caplog.text


def make_meta(**fields):
    config = flatten_config(tiny.make_config(**fields))
    progress = {"epoch": 2, "best_step": 0, "best_loss": 0.5, "history": []}
    return {"config": config, "progress": progress, "fingerprint": "fingerprint0"}


def test_at_another_size_moments_are_those_of_its_training_images(caplog):
    run, meta = make_run(**{"train.recompute_moments": 2, "data.image_size": 96}), make_meta()
    variables = run.create_state().variables
    fitted = outputs.refit_moments(run, variables, meta)
    expected = fit_moments(run, variables, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, fitted, expected)
    empty = dataclasses.replace(run.dataset.splits["train"], source=[])
    dataset = dataclasses.replace(run.dataset, splits=run.dataset.splits | {"train": empty})
    assert outputs.refit_moments(dataclasses.replace(run, dataset=dataset), variables, meta) is variables
    assert caplog.text.count("no training images") == 1


def test_stored_moments_are_kept_where_they_are_asked_for_and_warned_of_at_another_size(caplog):
    same = [(0, {}), (2, {"train.recompute_moments": 2}), (0, {"train.recompute_moments": 2})]
    for number, before in same:
        run = make_run(**{"train.recompute_moments": number})
        assert outputs.refit_moments(run, {}, make_meta(**before)) == {}
    assert not caplog.text
    assert outputs.refit_moments(make_run(**{"data.image_size": 96}), {}, make_meta()) == {}
    (record,) = caplog.records
    assert "training's 64 px, and images of 96 px" in record.message
    flags = re.findall(r"--config\.(\S+?)=(\w+)", record.message)
    assert flags == [("train.recompute_moments", "24"), ("train.resume_changed", "True")]
    # which a finished run's evaluation takes
    changed = tiny.make_config(**{field: {"24": 24, "True": True}[value] for field, value in flags})
    assert len(check_same_run(make_meta(), changed, "fingerprint0", pathlib.Path())) == 1


def test_a_changed_number_is_heeded_at_the_training_size(tmp_path, caplog, monkeypatch):
    """Also of a run that is older than the field."""
    run, variables = saved_run.save_run(tmp_path)
    with Checkpoints(tmp_path, "best") as best:
        state, _ = best.restore(run.abstract_state)
        meta = make_meta()
        del meta["config"]["train.recompute_moments"]
        best.save(state.replace(step=state.step + 1), meta)
    seen = []
    predict_dev = outputs.predict_dev
    monkeypatch.setattr(outputs, "predict_dev", lambda *args: seen.append(args[1]) or predict_dev(*args))
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    assert "other moments" not in load_trained_network(str(tmp_path)).threshold_origin
    fields = {"train.recompute_moments": 2, "train.resume_changed": True}
    outputs.evaluate(tiny.make_config(**fields), str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, seen[0], fit_moments(make_run(**fields), variables, 1, 2))
    assert "evaluated with a change: config.train.recompute_moments: 0 -> 2" in caplog.text
    assert caplog.text.count("--mode=predict and --mode=export keep the stored ones") == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["train.recompute_moments"] == 2
    predicting = load_trained_network(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, predicting.variables, variables)
    assert "of other moments of batch norm than are stored" in predicting.threshold_origin


def test_progress_does_not_matter_to_what_is_fitted():
    """A run cut on the dev split fits the same once more."""
    run = make_run(**{"train.recompute_moments": 2})
    state = run.create_state()
    one, other = (epoch_end.end_epoch(run, state, Progress(epoch=2))[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)
