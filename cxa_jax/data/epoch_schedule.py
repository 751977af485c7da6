"""Which images an epoch has, and in which order: a step is a number, and its rows follow from it. Numpy alone."""

import functools
import sys

import numpy as np


class EpochSchedule:
    """Endless random-access sequence: step -> (rows of the split [B], mask [B]).

    Each epoch is drawn from a Philox generator keyed by (seed, epoch). No batch crosses an epoch: the last one is
    filled up with rows from the start of the same epoch, mask False, so that batch normalisation sees real images, the
    loss counts every drawn image once, and the shape stays.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        num_negatives: int | None,
        positives_repeated: int = 1,
        strata: np.ndarray | None = None,
    ):
        """Prepare the schedule.

        Args:
          labels: int [N], 1 = positive.
          batch_size: B.
          seed: any integer.
          num_negatives: None: an epoch is every row once. n: every positive, and n negatives, drawn anew each epoch
            without replacement (all of them if there are fewer).
          positives_repeated: times that every positive stands in an epoch, where negatives are drawn.
          strata: [N], such as each image's view. The n negatives are then shared out among the strata as the positives
            are, to the nearest image, so that the stratum says nothing of the label within an epoch. A stratum of fewer
            negatives than its share has all of them as often as they fit, and the rest drawn: left short, it would
            tell the label again. No more are drawn in all than there are in the strata of positives, the others are
            not drawn from. A stratum without negatives is the caller's to refuse (`lacks_negatives`).
        """
        drawn = num_negatives is not None
        self._positives = np.repeat(np.flatnonzero(labels == 1), positives_repeated if drawn else 1)
        self._pools, weights = {"": np.flatnonzero(labels != 1)}, {"": 1}
        if strata is not None and drawn:
            names, counts = np.unique(strata[labels == 1], return_counts=True)
            self._pools = {str(name): np.flatnonzero((labels != 1) & (strata == name)) for name in names}
            weights = dict(zip(self._pools, counts.tolist(), strict=True))
        available = sum(map(len, self._pools.values()))
        self._quotas = _share_out(min(num_negatives, available) if drawn else available, weights)
        self._batch_size = batch_size
        self._seed = seed % 2**64
        # Two epochs: readers run ahead over the border between them.
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_positives(self) -> int:
        """Number of positives in an epoch: all, as often as they are repeated."""
        return len(self._positives)

    @property
    def num_images(self) -> int:
        """Number of images in an epoch."""
        return len(self._positives) + sum(self._quotas.values())

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the incomplete last one included."""
        return -(-self.num_images // self._batch_size)

    @property
    def negatives(self) -> dict[str, tuple[int, int]]:
        """For each stratum: negatives that an epoch draws, and negatives that there are."""
        return {name: (self._quotas[name], len(pool)) for name, pool in self._pools.items()}

    @property
    def lacks_negatives(self) -> list[str]:
        """Strata that have positives and no negative."""
        return [name for name, pool in self._pools.items() if not len(pool)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = divmod(step, self.steps_per_epoch)
        places = position * self._batch_size + np.arange(self._batch_size)
        rows = self._epoch_rows(epoch)
        return rows[places % len(rows)], places < len(rows)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))
        rows = [self._positives]
        for name, pool in self._pools.items():
            whole, rest = divmod(self._quotas[name], max(1, len(pool)))
            rows.append(np.tile(pool, whole))
            if rest:
                rows.append(pool[_permutation(bits, len(pool))[:rest]])
        rows = np.concatenate(rows)
        return rows[_permutation(bits, len(rows))]


def _share_out(total: int, weights: dict[str, int]) -> dict[str, int]:
    """Share out a total by weights, in whole numbers: rounded down, then one more where most was cut off."""
    whole = {name: divmod(total * weight, sum(weights.values())) for name, weight in weights.items()}
    quotas = {name: quota for name, (quota, _) in whole.items()}
    by_rest = sorted(whole, key=lambda name: -whole[name][1])  # stable: ties in the order of the names
    for name in by_rest[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _permutation(bits: np.random.Philox, size: int) -> np.ndarray:
    # Sorting raw bits instead of Generator.permutation: numpy keeps the former's stream the same between versions.
    return np.argsort(bits.random_raw(size), kind="stable")
