"""From a split to batches, with grain: random access, seeded global order, exact resume. Uses no jax.

A step of training is a number; `EpochSchedule` turns it into rows of the split, and reading them into a batch. So any
step can be reached without the ones before it, and the order does not depend on the number of reader threads.
"""

import functools

import grain
import numpy as np
from ml_collections import ConfigDict

from cxa_jax.array_types import Batch
from cxa_jax.data.datasets import Split
from cxa_jax.data.epoch_schedule import EpochSchedule
from cxa_jax.errors import UserError

PADDING = -1  # `index` of a row that is no image
NUM_PREFETCHED = 8  # batches read ahead


def make_train_iterator(
    split: Split,
    data_config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    own_rows: np.ndarray | None = None,
) -> grain.DatasetIterator:
    """Create the endless iterator over training batches.

    Args:
      split: the images.
      data_config: config.data; reads num_threads, sampling and what belongs to 'balanced'.
      batch_size: B.
      seed: draws the order (and the negatives of 'balanced').
      start_step: first step to deliver; as cheap as the first.
      own_rows: rows of each batch whose images are read, the others are zeros: those of this process where several
        train one network; None reads all.

    Returns:
      A grain iterator over Batch dicts of numpy arrays. `get_state()` is a JSON-able dict; `set_state(state)` continues
      with the batch that would have come next, whatever the number of threads.

    Raises:
      UserError: if the split is empty, or a field of the config makes no sense.
    """
    schedule = _create_schedule(split, data_config, batch_size, seed)
    dataset = grain.MapDataset.source(schedule).map(functools.partial(_read_batch, split, own_rows))
    iterator = iter(dataset.to_iter_dataset(_read_options(data_config.num_threads)))
    iterator.set_state(iterator.get_state() | {"next_index": start_step})
    return iterator


def steps_per_epoch(split: Split, data_config: ConfigDict, batch_size: int) -> int:
    """Return the number of training batches in an epoch: ceil(images / batch_size)."""
    return _create_schedule(split, data_config, batch_size, seed=0).steps_per_epoch


def epoch_labels(split: Split, data_config: ConfigDict) -> np.ndarray:
    """Return the labels of an epoch's images, int [N], in no order: all of them, or those 'balanced' draws."""
    schedule = _create_schedule(split, data_config, batch_size=1, seed=0)
    return np.repeat([1, 0], [schedule.num_positives, schedule.num_images - schedule.num_positives])


def describe_epoch(split: Split, data_config: ConfigDict) -> str:
    """Return in words what an epoch of training has: every image, or what 'balanced' draws, by stratum if it has any.

    Args:
      split: the images.
      data_config: config.data.

    Raises:
      UserError: as `make_train_iterator`.
    """
    if data_config.sampling == "all":
        return "every image once"
    schedule = _create_schedule(split, data_config, batch_size=1, seed=0)
    parts = []
    for name, (drawn, available) in schedule.negatives.items():
        stratum = f"{data_config.strata} {name or 'unknown'}: " if data_config.strata else ""
        repeated = ", so some are repeated" if drawn > available else ""
        parts.append(f"{stratum}{drawn:,} of {available:,}{repeated}")
    return f"{schedule.num_positives:,} positives; negatives, {'; '.join(parts)}"


def make_eval_iterator(
    split: Split, *, batch_size: int, num_threads: int, own_rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Create the iterator over a split in row order, each image exactly once.

    Args:
      split: the images.
      batch_size: B; the last batch is padded to it with zeros, mask False, index -1.
      num_threads: reader threads; 0 reads in the caller's.
      own_rows: as of `make_train_iterator`.

    Returns:
      A grain iterator over ceil(N / B) Batch dicts of numpy arrays.

    Raises:
      UserError: if the split is empty or a number makes no sense.
    """
    num_images = len(split.source)
    _check_batch_size(split, num_images, batch_size)

    def rows_of(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = step * batch_size + np.arange(batch_size)
        return np.where(rows < num_images, rows, PADDING), rows < num_images

    steps = grain.MapDataset.range(-(-num_images // batch_size)).map(rows_of)
    dataset = steps.map(functools.partial(_read_batch, split, own_rows))
    return iter(dataset.to_iter_dataset(_read_options(num_threads)))


def read_example(split: Split) -> Batch:
    """Return the first image as a batch of one: the shapes and types that every batch has."""
    return _read_batch(split, None, (np.zeros(1, np.int64), np.ones(1, bool)))


def _read_batch(split: Split, own_rows: np.ndarray | None, rows_and_mask: tuple[np.ndarray, np.ndarray]) -> Batch:
    rows, mask = rows_and_mask
    wanted = rows != PADDING
    if own_rows is not None:
        wanted &= np.isin(np.arange(len(rows)), own_rows)
    first, *others = np.flatnonzero(wanted) if wanted.any() else [0]  # 0: an end that leaves this process padding alone
    example = split.read_image(int(rows[first]))
    images = np.zeros((len(rows), *example.shape), example.dtype)
    if wanted[first]:
        images[first] = example
    for place in others:
        images[place] = split.read_image(int(rows[place]))
    labels = np.where(rows == PADDING, 0, split.index["label"][rows])
    return Batch(image=images, label=labels.astype(np.int32), mask=mask, index=rows.astype(np.int32))


def _create_schedule(split: Split, data_config: ConfigDict, batch_size: int, seed: int) -> EpochSchedule:
    labels = split.index["label"]
    _check_batch_size(split, len(labels), batch_size)
    match data_config.sampling:
        case "all":
            return EpochSchedule(labels, batch_size=batch_size, seed=seed, num_negatives=None)
        case "balanced":
            _check_balanced(split, data_config.negatives_per_positive)
            per_positive = data_config.negatives_per_positive * int(np.sum(labels == 1))
            schedule = EpochSchedule(
                labels,
                batch_size=batch_size,
                seed=seed,
                num_negatives=data_config.num_negatives or per_positive,
                positives_repeated=data_config.positives_repeated,
                strata=split.index[data_config.strata] if data_config.strata else None,
            )
            _check_strata(split, schedule, data_config.strata)
            return schedule
        case other:
            raise UserError(f"config.data.sampling is '{other}'; choose 'all' or 'balanced'.")


def _read_options(num_threads: int) -> grain.ReadOptions:
    if num_threads < 0:
        raise UserError(f"config.data.num_threads is {num_threads}; it must be 0 (read in the main thread) or more.")
    buffer_size = max(NUM_PREFETCHED, num_threads) if num_threads else 0
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)


def _check_batch_size(split: Split, num_images: int, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}; it must be at least 1.")
    if num_images == 0:
        raise UserError(f"The {split.name} split has no images; prepare the data with images of that split.")


def _check_balanced(split: Split, negatives_per_positive: int) -> None:
    if negatives_per_positive < 1:
        raise UserError(f"config.data.negatives_per_positive is {negatives_per_positive}; it must be at least 1.")
    if not np.any(split.index["label"] == 1):
        raise UserError(f"The {split.name} split has no positives to balance; use --config.data.sampling=all.")


def _check_strata(split: Split, schedule: EpochSchedule, field: str) -> None:
    if field and schedule.lacks_negatives:
        lacking = ", ".join(name or "unknown" for name in schedule.lacks_negatives)
        raise UserError(
            f"config.data.strata='{field}': the {split.name} split has positives of {field} {lacking} and no negatives "
            f"of it, so the {field} tells the label; prepare the data with such negatives, or set --config.data.strata="
        )
