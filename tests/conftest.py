"""Shared by all tests: JAX on the CPU, and where the real images lie."""

import os
import pathlib
import signal

import pytest

# Before any test imports jax. Compiled programs are kept, for this process and those that tests start: most compile
# the same few tiny networks.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# XLA's passes, but machine code without care: of the short tests' programs most are small and run once or twice.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# A shell starts jobs in the background with SIGINT ignored, which processes hand on; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = pathlib.Path(__file__).parents[2] / "shared/data"


def pytest_configure(config):
    """Compile quickly under -m "not slow"; what tests start does so only if handed QUICK_FLAGS."""
    if not compiles_quickly(config):
        return
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{flags or ''} {QUICK_FLAGS}"
    import jax  # after the environment is set

    jax.devices()  # reads the flags, once
    os.environ.pop("XLA_FLAGS")
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags


def compiles_quickly(config):
    """Return whether this process compiles with QUICK_FLAGS."""
    return config.option.markexpr == "not slow"


@pytest.fixture
def float64():
    """Float64 wherever jax is asked for no other type."""
    import jax  # after the environment is set

    with jax.enable_x64(True):
        yield
