import json
import os
import pathlib
import subprocess
import sys

import pytest

from cxa_jax import runtime
from cxa_jax.errors import UserError

PROGRAM = """
import json
import os
from cxa_jax.runtime import set_up_runtime
set_up_runtime()
import jax
print(json.dumps([len(jax.devices()), jax.config.jax_compilation_cache_dir, os.environ["XLA_FLAGS"]]))
"""


def start(**variables):
    """Return the devices and the cache that a fresh process has after `set_up_runtime`."""
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | {"JAX_PLATFORMS": "cpu"} | variables,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_two_cores_make_two_devices_and_programs_are_kept():
    expected = min(2, len(os.sched_getaffinity(0)))
    assert start(HOME="/nowhere") == [expected, "/nowhere/.cache/cxa_jax/xla", runtime.COMPILER_FLAGS]


@pytest.mark.parametrize(
    "variables, devices",
    [({"JAX_NUM_CPU_DEVICES": "3"}, 3), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4)],
    ids=["JAX_NUM_CPU_DEVICES", "XLA_FLAGS"],
)
def test_the_environment_goes_before(variables, devices):
    num_devices, cache, flags = start(JAX_COMPILATION_CACHE_DIR="/elsewhere", **variables)
    assert (num_devices, cache) == (devices, "/elsewhere")
    assert flags == f"{variables.get('XLA_FLAGS', '')} {runtime.COMPILER_FLAGS}".strip()


def test_own_compiler_flags_are_left_alone():
    own = "--xla_backend_extra_options=xla_cpu_optimize_for_size"
    assert start(XLA_FLAGS=own)[2] == own


def test_bfloat16_is_refused_where_it_would_crawl(monkeypatch):
    monkeypatch.setattr(runtime, "has_fast_bfloat16", lambda: False)
    runtime.check_compute_type("float32")
    with pytest.raises(UserError, match="model.dtype='bfloat16'.*model.dtype=float32"):
        runtime.check_compute_type("bfloat16")
    monkeypatch.setattr(runtime, "has_fast_bfloat16", lambda: True)
    runtime.check_compute_type("bfloat16")


@pytest.mark.parametrize(
    "flags, fast", [("fpu avx512f avx512_bf16", False), ("fpu amx_bf16 amx_tile", True), ("fp asimd bf16", True)]
)
def test_a_processor_tells_of_its_unit(monkeypatch, flags, fast):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: f"model name : X\nflags\t\t: {flags}\n")
    assert runtime.has_fast_bfloat16() is fast
