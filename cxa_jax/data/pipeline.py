"""From a split to batches, with grain: random access, seeded global order, exact resume. Uses no jax.

A step of training is a number; `EpochSchedule` turns it into rows of the split, and reading them into a batch. So any
step can be reached without the ones before it, and the order does not depend on the number of reader threads.
"""

import functools
import sys

import grain
import numpy as np
from ml_collections import ConfigDict

from cxa_jax.array_types import Batch
from cxa_jax.data.datasets import Split
from cxa_jax.errors import UserError

PADDING = -1  # `index` of a row that is no image
NUM_PREFETCHED = 8  # batches read ahead


class EpochSchedule:
    """Endless random-access sequence: step -> (rows of the split [B], mask [B]).

    Each epoch is drawn from a Philox generator keyed by (seed, epoch). No batch crosses an epoch: the last one is
    filled up with rows from the start of the same epoch, mask False, so that batch normalisation sees real images, the
    loss counts every image once, and the shape stays.
    """

    def __init__(self, labels: np.ndarray, *, batch_size: int, seed: int, negatives_per_positive: int | None):
        """Prepare the schedule.

        Args:
          labels: int [N], 1 = positive.
          batch_size: B.
          seed: any integer.
          negatives_per_positive: None: an epoch is every row once. k: every positive once, and k times as many
            negatives, drawn anew each epoch without replacement (all of them if there are fewer).
        """
        self._positives = np.flatnonzero(labels == 1)
        self._negatives = np.flatnonzero(labels != 1)
        self._num_negatives = len(self._negatives)
        if negatives_per_positive is not None:
            self._num_negatives = min(self._num_negatives, negatives_per_positive * len(self._positives))
        self._batch_size = batch_size
        self._seed = seed % 2**64
        # Two epochs: readers run ahead over the border between them.
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_positives(self) -> int:
        """Number of positives in an epoch: all."""
        return len(self._positives)

    @property
    def num_images(self) -> int:
        """Number of images in an epoch."""
        return len(self._positives) + self._num_negatives

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the incomplete last one included."""
        return -(-self.num_images // self._batch_size)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = divmod(step, self.steps_per_epoch)
        places = position * self._batch_size + np.arange(self._batch_size)
        rows = self._epoch_rows(epoch)
        return rows[places % len(rows)], places < len(rows)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))
        negatives = self._negatives
        if self._num_negatives < len(negatives):
            negatives = negatives[_permutation(bits, len(negatives))[: self._num_negatives]]
        rows = np.concatenate([self._positives, negatives])
        return rows[_permutation(bits, len(rows))]


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
      data_config: config.data; reads sampling, negatives_per_positive, num_threads.
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
            negatives_per_positive = None
        case "balanced":
            negatives_per_positive = data_config.negatives_per_positive
            _check_balanced(split, negatives_per_positive)
        case other:
            raise UserError(f"config.data.sampling is '{other}'; choose 'all' or 'balanced'.")
    return EpochSchedule(labels, batch_size=batch_size, seed=seed, negatives_per_positive=negatives_per_positive)


def _permutation(bits: np.random.Philox, size: int) -> np.ndarray:
    # Sorting raw bits instead of Generator.permutation: numpy keeps the former's stream the same between versions.
    return np.argsort(bits.random_raw(size), kind="stable")


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
