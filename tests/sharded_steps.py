"""Program: six training steps in float64 over all devices; writes the parameters.

Run by test_sharding.py with JAX_ENABLE_X64=1.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from cxa_jax.data.pipeline import make_train_iterator
from cxa_jax.models.cxa import CardioXAttentionNet
from cxa_jax.optimizer import create_optimizer
from cxa_jax.sharding import create_mesh, put_batch, replicated
from cxa_jax.steps import make_train_step
from cxa_jax.train_state import create_train_state


def main(path: str, implementation: str) -> None:
    config, dataset, mesh = tiny.make_config(), tiny.make_dataset(), create_mesh()
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](dtype=jnp.float64, implementation=implementation))
    tx = create_optimizer(0.01, 0.9)
    state = create_train_state(jax.random.key(1), model, tx, tiny.SIZE)
    to_double = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
    state = jax.device_put(jax.tree.map(to_double, state), replicated(mesh))
    step = jax.jit(make_train_step(model, tx, jax.random.key(0), (0.6, 2.0), "min_max", config.augment))
    iterator = make_train_iterator(dataset.splits["train"], config.data, batch_size=8, seed=0)
    for _ in range(6):  # the sixth batch of 44 images has masked rows
        batch = next(iterator)
        batch = put_batch({name: batch[name] for name in ("image", "label", "mask")}, mesh)
        state, _ = step(state, batch, jnp.float64(1))
    leaves = jax.tree.leaves(jax.device_get((state.params, state.batch_stats)))
    np.savez(path, *leaves, num_devices=mesh.size)


if __name__ == "__main__":
    main(*sys.argv[1:])
