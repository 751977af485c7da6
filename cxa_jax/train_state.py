"""Everything a step changes, as one pytree."""

import dataclasses
import functools
from typing import NamedTuple

import flax
import jax
import jax.extend.core
import jax.numpy as jnp
import optax

from cxa_jax.array_types import PyTree
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.models.initialization import run_on_host, runs_on_host


@flax.struct.dataclass
class TrainState:
    """Step counter, parameters, batch-norm statistics (never touched by the optimiser) and optimiser state.

    `healthy` turns False at the first step whose loss or gradient is not finite. From then on steps change nothing, so
    the host, which looks one step late, still holds the last good state.

    `averaged_params` and `fitted_stats` are what is evaluated and kept in place of the last step's parameters and the
    running moments: the average of the parameters over steps, and the moments recomputed at an epoch's end. Empty where
    the config does not ask for them. Training reads neither.
    """

    step: jax.Array
    healthy: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    averaged_params: PyTree = dataclasses.field(default_factory=dict)
    fitted_stats: PyTree = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes to evaluate: the averaged and the fitted, where there are any."""
        return {
            "params": self.averaged_params or self.params,
            "batch_stats": self.fitted_stats or self.batch_stats,
        }


def init_train_state(
    key: jax.Array, model: CardioXAttentionNet, tx: optax.GradientTransformation, image_size: int
) -> TrainState:
    """Initialise the state from one key; the network is traced at `image_size` but its arrays do not depend on it."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), jnp.ones((), bool), params, batch_stats, tx.init(params))


class Initialization(NamedTuple):
    """A traced `init_train_state`: the state's shapes and types, and the state of any key.

    Attributes:
      function: of one key, its outputs the leaves of the state.
      shapes: the state, with jax.ShapeDtypeStruct for arrays.
    """

    function: jax.extend.core.ClosedJaxpr
    shapes: TrainState

    def run(self, key: jax.Array) -> TrainState:
        """Initialise the state; the same key gives the same numbers on every platform, and as compiled."""
        if not runs_on_host(self.function, key):
            leaves = jax.jit(jax.extend.core.jaxpr_as_fun(self.function))(key)
        else:
            with jax.default_device(_find_processor()):
                leaves = run_on_host(self.function, key)
        return jax.device_put(jax.tree.unflatten(jax.tree.structure(self.shapes), leaves))


def trace_initialization(
    key: jax.Array, model: CardioXAttentionNet, tx: optax.GradientTransformation, image_size: int
) -> Initialization:
    """Trace `init_train_state`; nothing is compiled or drawn. Of the key only the type matters."""
    backbone = getattr(model, "backbone", None)
    if getattr(backbone, "remat", False):  # the same variables without, else they come out of its custom gradient
        model = model.clone(backbone=backbone.clone(remat=False))
    init = functools.partial(init_train_state, model=model, tx=tx, image_size=image_size)
    return Initialization(*jax.make_jaxpr(init, return_shape=True)(key))


def create_train_state(
    key: jax.Array, model: CardioXAttentionNet, tx: optax.GradientTransformation, image_size: int
) -> TrainState:
    """Initialise the state from one key, without compiling a program for it (initialization.py)."""
    return trace_initialization(key, model, tx, image_size).run(key)


def _find_processor() -> jax.Device | None:
    """Return the processor as a device; None, for jax' own choice, where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
