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

# A shell starts jobs in the background with SIGINT ignored, which processes hand on; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = pathlib.Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def float64():
    """Float64 wherever jax is asked for no other type."""
    import jax  # after the environment is set

    with jax.enable_x64(True):
        yield
