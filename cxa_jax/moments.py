"""Batch norm's moments, computed anew for the weights that are evaluated: running ones lag in short trainings."""

import jax
import numpy as np

from cxa_jax import interruption
from cxa_jax.array_types import PyTree
from cxa_jax.data.pipeline import make_train_iterator, steps_per_epoch
from cxa_jax.device_memory import naming_exhaustion
from cxa_jax.run import Run
from cxa_jax.sharding import own_rows, put_batch, put_replicated


def fit_moments(run: Run, variables: dict[str, PyTree], epoch: int, num_batches: int) -> dict[str, PyTree]:
    """Return `variables` with the moments of an epoch's first training batches, not augmented, under its parameters.

    Args:
      run: its data, order and jitted step; the draw of labels is the training's own.
      variables: {'params', 'batch_stats'}; of the latter only the shapes matter.
      epoch: whose order, from 0.
      num_batches: at least 1; of more than the epoch has, all of the epoch's.

    Raises:
      UserError: the training split has no images, or the device ran out of memory.
      Interrupted: a signal asked the process to end.
    """
    split, config = run.dataset.splits["train"], run.config
    size = config.train.batch_size
    per_epoch = steps_per_epoch(split, config.data, size)
    batches = make_train_iterator(
        split,
        config.data,
        batch_size=size,
        seed=config.seed,
        start_step=epoch * per_epoch,
        own_rows=own_rows(size, run.mesh),
    )
    shapes = variables["batch_stats"]
    moments = put_replicated(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), run.mesh)
    cure = (
        "lower --config.train.batch_size (at another test size --config.eval.batch_size), or set "
        "--config.train.recompute_moments=0"
    )
    with naming_exhaustion(f"the moments of config.train.batch_size={size} images", cure):
        for number in range(min(num_batches, per_epoch)):
            if jax.process_count() == 1:  # one of several must not leave the others
                interruption.check()
            images = put_batch(next(batches)["image"], run.mesh)
            jax.block_until_ready(moments)  # of the batch before: no more than one waits in the device's memory
            before = put_replicated(np.float32(number), run.mesh)
            moments = run.moments_step(variables["params"], moments, before, images)
    return variables | {"batch_stats": moments}
