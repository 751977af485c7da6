"""The run folder: strict JSON, atomic files, and which changes make another run of it."""

import json
import logging
import os

import numpy as np
import pytest

from configs import dense121
from cxa_jax.errors import UserError
from cxa_jax.workdir import (
    append_environment,
    check_same_run,
    describe_environment,
    flatten_config,
    log_to_file,
    open_workdir,
    to_json,
    write_atomically,
)


def test_json_is_strict_and_takes_numpy():
    text = to_json({"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), "d": (1, float("inf"))})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": 0.5, "c": [0, 1], "d": [1, None]}


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udcff")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_workdir_must_be_creatable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir="), open_workdir(tmp_path / "file" / "run"):
        pass
    with open_workdir(tmp_path / "ünï code") as folder:
        assert folder.is_dir()


def test_a_workdir_is_one_process_s_and_what_killed_ones_left_goes(tmp_path):
    (tmp_path / "metrics.csv.4711.tmp").write_text("half a r")
    (tmp_path / "mine.tmp").write_text("of the user")
    with open_workdir(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mine.tmp"]
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*choose another"):
            with open_workdir(tmp_path):
                pass
    with open_workdir(tmp_path):
        pass


def test_a_field_that_is_younger_than_the_run_had_its_default(tmp_path):
    config = dense121.get_config()
    meta = make_meta(config)
    del meta["config"]["train.accumulate_steps"]
    assert check_same_run(meta, config, "f", tmp_path) == []
    config.train.accumulate_steps = 2
    with pytest.raises(UserError, match="train.accumulate_steps: 1 -> 2"):
        check_same_run(meta, config, "f", tmp_path)


def test_environment_names_versions_and_commit():
    environment = describe_environment()
    assert environment["packages"]["jax"]
    assert environment["commit"]
    json.dumps(environment)


def make_meta(config):
    return {"config": json.loads(json.dumps(flatten_config(config))), "fingerprint": "f"}


def test_same_config_is_the_same_run(tmp_path):
    meta = make_meta(dense121.get_config())
    assert check_same_run(meta, dense121.get_config(), "f", tmp_path) == []


@pytest.mark.parametrize(
    "field, value", [("data.data_dir", "x"), ("eval.image_size", 64), ("train.num_epochs", 3), ("data.num_threads", 0)]
)
def test_free_fields_may_change(field, value, tmp_path):
    config = dense121.get_config()
    meta = make_meta(config)
    config.update_from_flattened_dict({field: value})
    assert check_same_run(meta, config, "f", tmp_path) == []


@pytest.mark.parametrize("field, value", [("seed", 1), ("train.batch_size", 3), ("augment.brightness", (0.5, 1.5))])
def test_other_fields_are_refused_by_name_unless_told(field, value, tmp_path):
    config = dense121.get_config()
    meta = make_meta(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config.{field}: "):
        check_same_run(meta, config, "f", tmp_path)
    config.train.resume_changed = True
    assert len(check_same_run(meta, config, "f", tmp_path)) == 1


@pytest.mark.parametrize(
    "field, value",
    [("backbone", "resnet50"), ("stride", 8), ("stride_by", "dilate"), ("pooling", "gap"), ("head", "linear")],
)
def test_another_network_is_refused_even_if_told(field, value, tmp_path):
    config = dense121.get_config()
    meta = make_meta(config)
    config.model[field] = value
    config.train.resume_changed = True
    with pytest.raises(UserError, match="another network"):
        check_same_run(meta, config, "f", tmp_path)


def test_each_start_adds_itself_to_the_environment(tmp_path):
    for _ in range(2):
        append_environment(tmp_path, "chest_phantom")
    sessions = json.loads((tmp_path / "environment.json").read_text())
    assert [session["data"] for session in sessions] == ["chest_phantom"] * 2


@pytest.mark.parametrize("content", [b"", b'[{"data": "x"}', b'{"data": "x"}', b"\xff\xfe", b"3"])
def test_a_damaged_list_of_starts_is_put_aside(tmp_path, content):
    path = tmp_path / "environment.json"
    path.write_bytes(content)
    append_environment(tmp_path, "chest_phantom")
    assert len(json.loads(path.read_text())) == 1
    assert (tmp_path / "environment.damaged").read_bytes() == content


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys, caplog):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log_to_file(tmp_path)
    for _ in range(3):
        logging.getLogger("cxa_jax").warning("a line")
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=str(tmp_path)), open_workdir(tmp_path):
        pass


def test_other_data_is_refused(tmp_path):
    config = dense121.get_config()
    with pytest.raises(UserError, match="data fingerprint"):
        check_same_run(make_meta(config), config, "g", tmp_path)
