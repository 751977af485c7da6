"""Glorot's uniform draws, and a way to initialise a network without compiling a program for it.

Compiled, the initialisation of a network is hundreds of small programs, each run once: on a processor they cost a third
of what the train step's compilation does, on a GPU twice as much as that. Yet all there is to do is to draw the kernels
and to fill the rest with zeros and ones. `run_on_host` does just that, from the traced function, and gives the very
numbers of the compiled one.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.random import threefry_2x32
from scipy.special import ndtri

HOST_OPERATIONS = {"broadcast_in_dim", "random_fold_in", "glorot_uniform"}
CHUNK = 1 << 16  # draws of one call: one program for arrays of all sizes


@partial(jax.jit, static_argnums=(1, 2))
def glorot_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from Glorot's uniform distribution (R11; Flax' own default is LeCun's normal one).

    Jitted so that it stands in a traced function under its name.
    """
    return nn.initializers.glorot_uniform()(key, shape, dtype)


def runs_on_host(function: core.ClosedJaxpr, key: jax.Array) -> bool:
    """Return whether `run_on_host` does what the compiled function would, and at once.

    So it is unless another generator than jax' default is set (jax_default_prng_impl, jax_threefry_partitionable), or a
    module draws by something else than `glorot_uniform`.
    """
    is_threefry = bool(jax.config.jax_threefry_partitionable) and str(jax.random.key_impl(key)) == "threefry2x32"
    return is_threefry and {_name(equation) for equation in find_needed(function.jaxpr)} <= HOST_OPERATIONS


def run_on_host(function: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Evaluate a traced initialisation, only what its outputs need, on the host.

    Args:
      function: traced; its random numbers are those of `glorot_uniform`, from threefry keys.
      arguments: flat.

    Returns:
      Its outputs, flat: numpy arrays, as far as they are draws or constants.
    """
    values = dict(zip(function.jaxpr.constvars, function.consts, strict=True))
    values |= dict(zip(function.jaxpr.invars, arguments, strict=True))

    def read(variable: core.Var | core.Literal) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in find_needed(function.jaxpr):
        outputs = _evaluate(equation, [read(variable) for variable in equation.invars])
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in function.jaxpr.outvars]


def find_needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Return the equations that the outputs depend on, in order."""
    wanted, needed = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            needed.append(equation)
            wanted.update(v for v in equation.invars if isinstance(v, core.Var))
    return needed[::-1]


def _evaluate(equation: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    output = equation.outvars[0].aval
    if _name(equation) == "glorot_uniform":
        return [draw_glorot_uniform(inputs[0], output.shape)]
    if equation.primitive.name == "broadcast_in_dim" and np.ndim(inputs[0]) == 0:
        return [np.full(output.shape, inputs[0], output.dtype)]
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _name(equation: core.JaxprEqn) -> str:
    """A jitted function's name, else the operation's."""
    return equation.params.get("name") or equation.primitive.name


def draw_glorot_uniform(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Return what `glorot_uniform(key, shape)` does, float32, without a program for each shape.

    Element n of an array hashes the key with n (threefry, as `jax.random` does by default), so that chunks of any size
    put together are the whole.
    """
    size, words = math.prod(shape), jax.random.key_data(key)
    chunks = [np.asarray(_draw_chunk(words, np.uint32(start))) for start in range(0, size, CHUNK)]
    uniform = np.concatenate(chunks)[:size].reshape(shape)
    in_axes = shape[-2] * math.prod(shape[:-2]), shape[-1] * math.prod(shape[:-2])
    variance = np.float32(2 / sum(in_axes))
    return np.maximum(uniform * np.float32(2) - np.float32(1), np.float32(-1)) * np.sqrt(np.float32(3) * variance)


def make_he_normal(kernel: np.ndarray) -> np.ndarray:
    """Turn a kernel drawn from Glorot's uniform distribution into one from He's normal one, by the same random numbers.

    Variance 2 / fan in (He et al. 2015), as PyTorch's DenseNets begin; each draw keeps its rank.

    Args:
      kernel: [kh, kw, C_in, C_out], as `glorot_uniform` draws it.

    Returns:
      float32, of the same shape.
    """
    fan_in, fan_out = math.prod(kernel.shape[:-1]), math.prod(kernel.shape[:-2]) * kernel.shape[-1]
    uniform = (kernel.astype(np.float64) / math.sqrt(6 / (fan_in + fan_out)) + 1) / 2
    half_step = 2.0**-24  # of the draws, multiples of 2^-23: 0 is one of them, and its normal number is infinite
    return (ndtri(np.clip(uniform, half_step, 1 - half_step)) * math.sqrt(2 / fan_in)).astype(np.float32)


@jax.jit
def _draw_chunk(words, start):
    """CHUNK uniform numbers in [0, 1), the elements start, start + 1, ... of an array below 2^32."""
    low = start + jnp.arange(CHUNK, dtype=jnp.uint32)
    first, second = threefry_2x32(words, jnp.concatenate([jnp.zeros_like(low), low])).reshape(2, CHUNK)
    mantissa = lax.shift_right_logical(first ^ second, np.uint32(9)) | np.uint32(0x3F800000)
    return lax.bitcast_convert_type(mantissa, jnp.float32) - 1
