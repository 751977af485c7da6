"""train_and_evaluate: the story of a run. The only file that loops over epochs.

What needs scikit-learn or matplotlib is imported late, by a thread beside the second step: it takes 1.5 s.
"""

import concurrent.futures
import functools
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from cxa_jax import distributed, interruption
from cxa_jax.array_types import Batch
from cxa_jax.background_saves import BackgroundSaves
from cxa_jax.checkpointing import Checkpoints, read_first
from cxa_jax.console import progress_bar
from cxa_jax.data.pipeline import make_train_iterator, steps_per_epoch
from cxa_jax.device_memory import naming_exhaustion
from cxa_jax.distributed import writable
from cxa_jax.epoch_end import end_epoch
from cxa_jax.errors import UserError
from cxa_jax.metric_writer import MetricWriter, count_rows
from cxa_jax.progress import Progress
from cxa_jax.run import Run, create_run, log_run
from cxa_jax.runtime import check_compute_type
from cxa_jax.sharding import own_rows, put_batch, put_replicated
from cxa_jax.train_state import TrainState
from cxa_jax.warm_up import compiling_train_step
from cxa_jax.workdir import (
    append_environment,
    check_same_run,
    flatten_config,
    log_to_file,
    open_workdir,
    write_atomically,
)

log = logging.getLogger(__name__)


def train_and_evaluate(config: Any, workdir: str) -> dict[str, Any]:
    """Train until the config's end, keep the lowest-dev-loss state, test it, write everything to `workdir`.

    The same call on the same workdir goes on where a cut run stopped, bit for bit as if it had not been cut.

    Returns:
      What was written to metrics.json.

    Raises:
      UserError: config, data or workdir cannot be used, the loss stopped being finite, or memory or disk is full; the
        message has the cure.
      Interrupted: a signal asked the process to end, and the state is saved.
    """
    check_compute_type(config.model.dtype)
    with open_workdir(workdir) as folder, writable(folder) as output:
        log_to_file(output)
        run = create_run(config)
        log_run(run)
        with naming_exhaustion(*_describe_memory(config.train)), distributed.stopping_together():
            train(run, folder, output)
        with interruption.held_back():  # a signal in the middle of an import would break libraries
            from cxa_jax.outputs import write_outputs
        return write_outputs(run, folder, output)


def _describe_memory(train_config: ConfigDict) -> tuple[str, str]:
    """Return what asks for a device's memory, and what to change."""
    num_parts = train_config.accumulate_steps
    return (
        f"config.train.batch_size={train_config.batch_size} in {num_parts} part(s)",
        f"set --config.train.accumulate_steps={2 * num_parts}, or a smaller --config.train.batch_size, or "
        "--config.train.remat=True (the last leaves every number as it is)",
    )


def train(run: Run, folder: pathlib.Path, output: pathlib.Path) -> None:
    """Train to the config's end, from where the checkpoints of `folder` stand; other files are written to `output`."""
    with BackgroundSaves(folder) as saves, concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        state, progress, iterator = start_or_resume(run, output, saves.latest, saves.best)
        draw = progress.epoch == 0 or not (folder / "augmentation.pdf").exists()  # a run may have been cut before it
        prepare = functools.cache(lambda: pool.submit(_prepare_epoch_end, run, output, draw=draw))  # once
        with MetricWriter(output, progress.history, run.dataset.description) as writer, interruption.held_back():
            while progress.epoch < run.config.train.num_epochs and not progress.early_stop.stop:
                state, progress = train_epoch(run, state, progress, iterator, saves, after_step=prepare)
                try:
                    distributed.stop_if_agreed()
                    state, progress = end_epoch(run, state, progress)
                except interruption.Interrupted:  # here or on the dev split: the epoch's steps are not lost
                    saves.save(state, make_meta(run, progress, iterator))
                    raise
                saves.wait()  # no row of this epoch if the one before cannot be written
                writer.write(progress.history)  # first: a cut between the two writes the same row again
                is_best = progress.best_step == int(state.step)
                saves.save(state, make_meta(run, progress, iterator), is_best=is_best)
                prepare().result()
                distributed.stop_if_agreed()
            if draw:  # also where a run was cut behind its last epoch
                prepare().result()


def _prepare_epoch_end(run: Run, output: pathlib.Path, *, draw: bool) -> None:
    """Import what an epoch's end needs, and draw the augmented images if asked, while the device works."""
    from cxa_jax import figures, metrics  # noqa: F401

    if draw:
        figures.save_augmentation_grid(run, output / "augmentation.png")


def start_or_resume(
    run: Run, folder: pathlib.Path, latest: Checkpoints, best: Checkpoints
) -> tuple[TrainState, Progress, Any]:
    """Return state, progress and iterator: the workdir's newest sound ones if it has any, else new ones.

    The best state can be gone on from as well: it is taken where no latest one is sound, or where a run was cut after
    its best was written and before its latest.

    Raises:
      UserError: the workdir holds another run.
    """
    # The meta first, alone: another network's arrays would not fit the mould.
    stores = sorted((latest, best), key=lambda store: max(store.steps(), default=-1), reverse=True)
    if stores[0] is best:
        log.warning("going on from the best state, of step %d: %s has none as new", best.steps()[0], latest.directory)
    meta = read_first(Checkpoints.read_meta, *stores)
    changes = check_same_run(meta, run.config, run.dataset.fingerprint, folder) if meta else []
    write_atomically(folder / "config.json", run.config.to_json_best_effort(indent=2) + "\n")
    append_environment(folder, run.dataset.name)
    restored = read_first(lambda store: store.restore(run.abstract_state), *stores) if meta else None
    known = count_rows(folder / "metrics.csv")
    split, size = run.dataset.splits["train"], run.config.train.batch_size
    options = {"batch_size": size, "seed": run.config.seed, "own_rows": own_rows(size, run.mesh)}
    if restored is None:
        if known:
            log.warning(
                "%s tells of %d epochs, but there is no checkpoint: starting anew", folder / "metrics.csv", known
            )
        iterator = make_train_iterator(split, run.config.data, **options)
        with compiling_train_step(run):
            state = run.create_state()
        return state, Progress(), iterator
    state, meta = restored
    progress = Progress.from_meta(meta["progress"])
    if changes and progress.epoch_step:
        progress = progress.restart_epoch()  # the order within the epoch may be another one now
    if any(change.startswith(("data ", "config.data.", "config.model.", "config.train.")) for change in changes):
        progress = progress.forget_best()  # dev values from before and after cannot be compared
    position = progress.epoch * steps_per_epoch(split, run.config.data, size) + progress.epoch_step
    iterator = make_train_iterator(split, run.config.data, **options, start_step=position)
    if not changes:
        iterator.set_state(json.loads(meta["iterator"]))
    if known > progress.epoch:
        log.warning(
            "metrics.csv tells of %d epochs, the checkpoint of %d: the rest is done again", known, progress.epoch
        )
    log.info("resuming %s at step %d, epoch %d", folder, int(state.step), progress.epoch + 1)
    for change in changes:
        log.warning("resumed with a change: %s", change)
    return state, progress, iterator


def make_meta(run: Run, progress: Progress, iterator: grain.DatasetIterator) -> dict[str, Any]:
    """Return what a checkpoint holds besides arrays, in JSON's types."""
    return {
        "progress": progress.to_meta(),
        "iterator": json.dumps(iterator.get_state()),
        "root_key": np.asarray(jax.random.key_data(run.root_key)).tolist(),
        "config": flatten_config(run.config),
        "fingerprint": run.dataset.fingerprint,
        "data": run.dataset.name,
    }


def train_epoch(
    run: Run,
    state: TrainState,
    progress: Progress,
    iterator: grain.DatasetIterator,
    saves: BackgroundSaves,
    after_step: Callable[[], Any],
) -> tuple[TrainState, Progress]:
    """Train to the end of the epoch under way; `after_step` is called when a step is done and the next is under way.

    A step's metrics are fetched while the device works on the next step, so the host never holds it up.

    Raises:
      Interrupted: a signal asked the process to end; the state after the step under way is saved.
    """
    train, pending = run.config.train, None
    num_steps = steps_per_epoch(run.dataset.splits["train"], run.config.data, train.batch_size)
    rate_scale = put_replicated(np.float32(progress.plateau.scale), run.mesh)
    title = f"epoch {progress.epoch + 1}/{train.num_epochs}"
    started = progress.epoch_step * train.batch_size
    if progress.epoch_step == num_steps:
        return state, progress
    with progress_bar(num_steps * train.batch_size, title, initial=started) as bar:
        for epoch_step in range(progress.epoch_step, num_steps):
            batch = next(iterator)
            on_device = put_batch(run.select_inputs(batch), run.mesh)
            state, metrics = run.train_step(state, on_device, rate_scale, run.root_key)
            if pending is not None:
                progress = _fetch(run, state, progress, pending, saves, bar)
                after_step()
            saves.check()
            pending = batch, metrics
            due = train.checkpoint_every_steps and (epoch_step + 1) % train.checkpoint_every_steps == 0
            ends = distributed.is_stop_due(progress.epoch * num_steps + epoch_step)
            if due or ends:
                progress, pending = _fetch(run, state, progress, pending, saves, bar), None
                saves.save(state, make_meta(run, progress, iterator))
            if ends:
                distributed.stop()
        if pending is not None:
            progress = _fetch(run, state, progress, pending, saves, bar)
    return state, progress


def _fetch(
    run: Run,
    state: TrainState,
    progress: Progress,
    pending: tuple[Batch, dict[str, jax.Array]],
    saves: BackgroundSaves,
    bar: tqdm,
) -> Progress:
    batch, metrics = pending
    loss = float(metrics["loss"])
    if not bool(metrics["healthy"]):
        _stop_unhealthy(run, state, progress, batch, loss, saves)
    progress = progress.add_step(loss, int(batch["mask"].sum()))
    bar.set_postfix(loss=f"{progress.train_loss:.4f}", refresh=False)
    bar.update(run.config.train.batch_size)
    return progress


def _stop_unhealthy(
    run: Run, state: TrainState, progress: Progress, batch: Batch, loss: float, saves: BackgroundSaves
) -> None:
    """Save the state, which froze before the bad step, and raise."""
    step = int(state.step)
    split = run.dataset.splits["train"]
    num_steps = steps_per_epoch(split, run.config.data, run.config.train.batch_size)
    position = progress.epoch * num_steps + progress.epoch_step
    iterator = make_train_iterator(
        split, run.config.data, batch_size=run.config.train.batch_size, seed=run.config.seed, start_step=position
    )
    saves.save(state.replace(healthy=jax.numpy.ones_like(state.healthy)), make_meta(run, progress, iterator))
    saves.wait()
    rate = run.rate_at(step, progress.plateau.scale)
    ids = ", ".join(split.index["id"][batch["index"]].tolist())
    raise UserError(
        f"the loss is {loss} or its gradient is not finite at step {step} (epoch {progress.epoch + 1}), learning rate "
        f"{rate:g}, images {ids}.\nThe state before this step is kept in {saves.latest.directory}. Look at these "
        "images, or go on with a lower --config.optimizer.learning_rate and --config.train.resume_changed=True."
    )
