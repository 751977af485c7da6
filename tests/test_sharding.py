"""Data parallelism: several devices train as one."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import QUICK_FLAGS

from cxa_jax.errors import UserError
from cxa_jax.sharding import check_batch_size, create_mesh, put_batch, replicated

PROGRAM = pathlib.Path(__file__).with_name("sharded_steps.py")


def train_on(num_devices, path, implementation):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": f"{QUICK_FLAGS} --xla_force_host_platform_device_count={num_devices}",
    }
    command = [sys.executable, str(PROGRAM), str(path), implementation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(path))


@pytest.mark.parametrize("implementation", [pytest.param("plain", marks=pytest.mark.slow), "fused"])
def test_eight_devices_train_as_one(tmp_path, implementation):
    """In float64, so that anything but rounding shows: batch norm must see the moments of the whole batch."""
    one = train_on(1, tmp_path / "one.npz", implementation)
    eight = train_on(8, tmp_path / "eight.npz", implementation)
    assert (one.pop("num_devices"), eight.pop("num_devices")) == (1, 8)
    assert one.keys() == eight.keys() and len(one) > 50
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_batch_size_must_be_a_positive_multiple():
    mesh = create_mesh(jax.devices()[:1])
    check_batch_size("field", 3, mesh)
    with pytest.raises(UserError, match="config.train.batch_size=0"):
        check_batch_size("config.train.batch_size", 0, mesh)
    check_batch_size("config.train.batch_size", 6, mesh, num_parts=3)
    with pytest.raises(UserError, match=r"batch_size=8 must be .* 1 device\(s\) x config.train.accumulate_steps=3"):
        check_batch_size("config.train.batch_size", 8, mesh, num_parts=3)


def test_put_batch_keeps_bytes():
    mesh = create_mesh(jax.devices()[:1])
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    on_device = put_batch({"image": images}, mesh)["image"]
    assert on_device.dtype == np.uint8
    np.testing.assert_array_equal(on_device, images)
    assert on_device.sharding.mesh == replicated(mesh).mesh


def test_a_processor_gives_as_many_devices_as_divide_the_batches(monkeypatch):
    devices = jax.devices()[:1] * 8
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert create_mesh().size == 8
    assert create_mesh(batch_sizes=(16, 12)).size == 4
    assert create_mesh(batch_sizes=(16, 3)).size == 1
