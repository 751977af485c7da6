"""What keeps `make test` short: programs compiled fast, variables without a program for them, cases left for later.

Steps whose answer to NaN or infinity is tested take `jit_as_users`: an optimiser that takes numbers for finite could
alter it.
"""

import jax
import pytest

from cxa_jax.models.initialization import run_on_host

QUICK = {"xla_backend_optimization_level": 0}  # XLA's passes, without LLVM's: compile fast, run slowly
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}  # against conftest's flags


def jit(function, **options):
    """Return jax.jit(function), to be compiled as QUICK says."""
    return jax.jit(function, compiler_options=QUICK, **options)


def jit_as_users(function, **options):
    """Return jax.jit(function), to be compiled with the care it has outside the tests."""
    return jax.jit(function, compiler_options=AS_USERS, **options)


def initialize(module, key, images):
    """Return the variables that module.init(key, images) gives."""
    traced, shapes = jax.make_jaxpr(module.init, return_shape=True)(key, images)
    leaves = run_on_host(traced, key, images)
    return jax.tree.unflatten(jax.tree.structure(shapes), map(jax.numpy.asarray, leaves))


def slow(*values):
    """Return values of pytest.mark.parametrize that `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
