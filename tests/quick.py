"""Programs that a test runs once or twice: compiled fast, and variables without a program for them.

Not for a program whose answer to NaN or infinity is tested: an optimiser that takes numbers for finite could alter it.
"""

import jax

from cxa_jax.models.initialization import run_on_host

QUICK = {"xla_backend_optimization_level": 0}  # XLA's passes, without LLVM's: compile fast, run slowly


def jit(function, **options):
    """Return jax.jit(function), to be compiled as QUICK says."""
    return jax.jit(function, compiler_options=QUICK, **options)


def initialize(module, key, images):
    """Return the variables that module.init(key, images) gives."""
    traced, shapes = jax.make_jaxpr(module.init, return_shape=True)(key, images)
    leaves = run_on_host(traced, key, images)
    return jax.tree.unflatten(jax.tree.structure(shapes), map(jax.numpy.asarray, leaves))
