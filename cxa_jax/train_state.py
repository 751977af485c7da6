"""Everything a step changes, as one pytree."""

import functools

import flax
import jax
import jax.numpy as jnp
import optax

from cxa_jax.array_types import PyTree
from cxa_jax.models.cxa import CardioXAttentionNet


@flax.struct.dataclass
class TrainState:
    """Step counter, parameters, batch-norm statistics (never touched by the optimiser) and optimiser state.

    `healthy` turns False at the first step whose loss or gradient is not finite. From then on steps change nothing, so
    the host, which looks one step late, still holds the last good state.
    """

    step: jax.Array
    healthy: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_train_state(
    key: jax.Array, model: CardioXAttentionNet, tx: optax.GradientTransformation, image_size: int
) -> TrainState:
    """Initialise the state from one key; the network is traced at `image_size` but its arrays do not depend on it."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), jnp.ones((), bool), params, batch_stats, tx.init(params))


def create_train_state(
    key: jax.Array, model: CardioXAttentionNet, tx: optax.GradientTransformation, image_size: int
) -> TrainState:
    """Run `init_train_state` compiled, on the processor; without jit Flax' init runs the network op by op.

    The same key gives the same numbers whatever accelerator there is, and a GPU's compiler takes many times as long for
    the hundreds of small programs that draw them.
    """
    init = functools.partial(init_train_state, model=model, tx=tx, image_size=image_size)
    # It runs once, so what counts is to compile it quickly: the numbers are the same ones.
    jitted = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_device(_find_processor()):
        return jitted(jax.random.wrap_key_data(jax.device_get(jax.random.key_data(key)), impl=jax.random.key_impl(key)))


def _find_processor() -> jax.Device | None:
    """Return the processor as a device; None, for jax' own choice, where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
