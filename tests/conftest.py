"""Shared by all tests: JAX on the CPU, and where the real images lie."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before any test imports jax

REAL = pathlib.Path(__file__).parents[2] / "shared/data"
