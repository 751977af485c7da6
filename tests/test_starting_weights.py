"""A training starts from a weights file: the backbone, and each part that means the same; the rest is drawn afresh."""

import json
import shutil

import jax
import numpy as np
import pytest
import saved_run
import tiny
from test_weights_file import rewrite

from cxa_jax.config_checks import check_config
from cxa_jax.errors import UserError
from cxa_jax.export import export
from cxa_jax.run import create_run
from cxa_jax.starting_weights import check_same_backbone
from cxa_jax.weights_file import read_weights
from cxa_jax.workdir import describe_changes, flatten_config


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Weights of a run with another seed than those that start from them."""
    folder = tmp_path_factory.mktemp("run")
    saved_run.save_run(folder, seed=7)
    return export(str(folder), str(folder / "tiny.safetensors"))


def start(path, **fields):
    """Return the first variables of a run that starts from the file, and of the same run that does not."""
    dataset = tiny.make_dataset()
    runs = [create_run(tiny.make_config(**fields, **init), dataset) for init in ({"init.weights": str(path)}, {})]
    return *[run.create_state() for run in runs], runs[0]


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize(
    "fields, fresh",
    [
        ({}, []),
        ({"model.head": "linear"}, ["classifier"]),
        ({"model.attended": "raw"}, ["classifier"]),
        ({"model.pooling": "gap"}, ["classifier"]),
        ({"model.pooling": "softmax"}, ["amm", "classifier"]),
        ({"model.pooling": "gated"}, ["gate", "classifier"]),
        ({"model.labels": "cardiomegaly", "model.kernel_init": "he_normal"}, []),
    ],
)
def test_parts_that_mean_the_same_are_taken(path, caplog, fields, fresh):
    with caplog.at_level("INFO"):
        state, unstarted, _ = start(path, **fields)
    stored = read_weights(path)
    assert set(fresh) < set(state.params)
    for part in state.params:
        for name in ("params", "batch_stats"):
            found, drawn = getattr(state, name).get(part, {}), getattr(unstarted, name).get(part, {})
            prefix = f"{name}/{part}/"
            theirs = {key: value for key, value in stored.tensors.items() if key.startswith(prefix)}
            flat = {
                jax.tree_util.keystr(where, simple=True, separator="/"): leaf
                for where, leaf in jax.tree_util.tree_leaves_with_path({name: {part: found}})
            }
            if part in fresh:
                assert equal(found, drawn), prefix
            else:
                assert flat.keys() == theirs.keys() and all(np.array_equal(flat[key], theirs[key]) for key in flat)
                assert name == "batch_stats" or not equal(found, drawn), f"{prefix} could be the drawn one"
    taken = ", ".join(part for part in state.params if part not in fresh)
    left = ", ".join(part for part in state.params if part in fresh) or "none"
    assert f"{taken}; fresh: {left}" in caplog.text


def test_what_is_evaluated_starts_there_too(path):
    state, _, _ = start(path, **{"optimizer.ema_decay": 0.9, "train.recompute_moments": 2})
    assert equal(state.averaged_params, state.params) and equal(state.fitted_stats, state.batch_stats)
    assert np.array_equal(
        state.params["backbone"]["stem_conv"]["kernel"], read_weights(path).tensors["params/backbone/stem_conv/kernel"]
    )


def test_the_config_remembers_where_it_started(path):
    run = create_run(tiny.make_config(**{"init.weights": str(path)}), tiny.make_dataset())
    flat = flatten_config(run.config)
    assert json.loads(run.config.to_json_best_effort())["init"]["weights"] == str(path)
    assert describe_changes(flat, flat | {"init.weights": ""}) == [f"config.init.weights: {str(path)!r} -> ''"]


def test_another_backbone_or_stride_is_refused(path, tmp_path):
    told = read_weights(path).description["config"]
    for config, message in (
        ({"model.backbone": "resnet50"}, "has resnet50; wanted is the best state of a tiny"),
        ({"model.stride": 8}, "has a tiny/8, whose stages end at stride 8; tiny ends at 32"),
    ):
        shutil.copy(path, tmp_path / "a.safetensors")
        rewrite(tmp_path / "a.safetensors", config=told | config)
        with pytest.raises(UserError, match=f"config.init.weights=.*a.safetensors {message}"):
            start(tmp_path / "a.safetensors")
    dilated = {"model.backbone": "tiny", "model.stride": 8, "model.stride_by": "dilate"}
    check_same_backbone("x", dilated, told)  # has the whole one's variables


def test_a_backbone_that_is_not_whole_is_refused(path, tmp_path):
    shutil.copy(path, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", tensors={"params/backbone/stem_conv/kernel": None})
    with pytest.raises(UserError, match="stem_conv/kernel is missing"):
        start(tmp_path / "a.safetensors")


def test_another_normalisation_is_warned_of(path, caplog):
    start(path)
    assert "normalised" not in caplog.text
    start(path, **{"data.normalization": "div255"})
    assert "saw images normalised by 'min_max', and this run's are by 'div255'" in caplog.text


@pytest.mark.parametrize("other", ["keras_weights", "torch_weights", "run"])
def test_one_source_alone(other):
    config = tiny.make_config(**{"init.weights": "nih128", f"init.{other}": "x"})
    with pytest.raises(UserError, match=f"config.init.{other} and config.init.weights are set: choose one"):
        check_config(config, 1)


def test_what_is_no_weights_file(path, tmp_path):
    with pytest.raises(UserError, match="config.init.weights=nothing is no file and no folder: give"):
        start("nothing")
    with pytest.raises(UserError, match="is a folder: .* --config.init.run"):
        start(tmp_path)
