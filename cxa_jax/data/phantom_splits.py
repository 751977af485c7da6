"""Which phantom patients train, and which are held out."""

import numpy as np

from cxa_jax.data import phantom
from cxa_jax.errors import UserError

SPLITS = ("train", "dev", "test")
HELD_OUT_FRACTION = 0.15  # of the patients, for dev and for test each


def assign_splits(spec: phantom.PhantomSpec, num_patients: int) -> dict[str, list[int]]:
    """Assign every patient to one split: 70 % train, 15 % dev, 15 % test.

    Patients with a positive image and patients without are dealt out separately, at least one of each to every split,
    so that every split holds both classes.

    Args:
        spec: the population.
        num_patients: patients 0 to num_patients - 1 take part.

    Returns:
        Split name -> ascending patient numbers.

    Raises:
        UserError: if fewer than three patients have a positive image, or fewer than three have none.
    """
    rng = phantom.stream_rng(spec.seed, phantom.Stream.SPLIT)
    positive = np.array([phantom.has_positive_image(spec, patient) for patient in range(num_patients)])
    groups = [rng.permutation(np.flatnonzero(positive)), rng.permutation(np.flatnonzero(~positive))]
    if min(map(len, groups)) < len(SPLITS):
        raise UserError(
            f"{len(groups[0])} of {num_patients} phantom patients have a positive image: every split needs patients "
            "with and without; raise config.data.phantom.num_patients or change config.data.phantom.prevalence or .seed"
        )
    held_out = round(HELD_OUT_FRACTION * num_patients)
    held_out_positive = min(max(1, round(HELD_OUT_FRACTION * len(groups[0]))), held_out - 1)
    counts = held_out_positive, held_out - held_out_positive
    dealt = [np.split(group, (count, 2 * count)) for group, count in zip(groups, counts, strict=True)]
    dev, test, train = (sorted(np.concatenate(parts).tolist()) for parts in zip(*dealt, strict=True))
    return {"train": train, "dev": dev, "test": test}
