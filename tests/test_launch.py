"""The command line as a user meets it: help, and one clear message for each mistake."""

import os
import pathlib
import subprocess
import sys

import pytest
from quick import slow

from cxa_jax.usage import MODES

ROOT = pathlib.Path(__file__).parents[1]


def launch(*arguments, cwd=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def test_help_groups_its_flags_by_mode():
    done = launch("--mode=predict", "--help")
    assert done.returncode == 0 and not done.stderr
    parts = {part.split()[0]: part for part in done.stdout.split("\n--mode=")[1:]}
    assert {name.rstrip(":") for name in parts} == set(MODES)
    for flag in ("--workdir", "--inputs", "--output", "python launch.py --mode=predict"):
        assert flag in parts["predict:"]
    assert "--inputs" not in parts["export:"] and max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--config is required"),
        (("--config=configs/nothing.py",), "configs/nothing.py"),
        (("--config=configs/dense121.py:gab",), "unknown variant 'gab'"),
        (("--config=README.md",), "README.md"),
        (("--config=configs/dense121.py", "--config.seed=-1"), "config.seed=-1"),
        slow(("--config=configs/incepres2.py", "--config.data.image_size=64"), "needs at least 75 px"),
        (("--config=configs/dense121.py:phantom_quick", "--config.data.data_dir=README.md/x"), "README.md/x"),
        (("--config=configs/dense121.py", "--mode=evaluate"), "holds no checkpoint"),
        (("--config=configs/dense121.py", "--mode=tarin"), "train|evaluate"),
        (("--config=configs/dense121.py", "--mode=ablate"), "use --config=configs/ablation.py"),
        (("--mode=report", "--workdirs=none/a,none/b"), "there is no"),
        (("--config=configs/dense121.py", "--config.train.bach_size=3"), 'Did you mean "batch_size"'),
        (("--config=configs/dense121.py", "--config.train.batch_size=many"), "train.batch_size=many"),
        (("--config=configs/dense121.py", "--workdri=x"), "workdri"),
        (("--config=configs/dense121.py", "train"), "unexpected argument(s) train"),
        (("--mode=predict", "--inputs=a.png", "b.png"), "holds no trained run"),
        (("--mode=predict", "--inputs=a.png", "--weights=nih128"), "--workdir and --weights both"),
        (("--config=configs/dense121.py", "--mode=prepare"), "manual_dir"),
        slow(("--config=configs/dense121.py", "--mode=prepare", "--config.data.manual_dir=/nowhere"), "/nowhere"),
        slow(("--config=configs/dense121.py", "--config.model.backbone=vgg"), "config.model.backbone='vgg'"),
        slow(("--config=configs/dense121.py", "--config.data.name=mnist"), "mnist"),
        (("--config=configs/dense121.py", "--config.data.name=chestxray14", "--config.data.data_dir=none"), "prepare"),
        slow(("--config=configs/dense121.py", "--config.train.select_by=luck"), "config.train.select_by='luck'"),
    ],
)
def test_mistakes_end_in_one_message(arguments, message, tmp_path):
    done = launch(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 12, done.stderr


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = launch("--config=configs/dense121.py:phantom_quick", f"--workdir={tmp_path / 'file' / 'run'}")
    assert done.returncode != 0 and "cannot be created" in done.stderr and "Traceback" not in done.stderr
