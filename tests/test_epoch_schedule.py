"""What a balanced epoch draws: positives repeated, negatives by number and by view, the order of old runs kept."""

import collections
import fractions
import json

import numpy as np
import pytest

from configs.dense121 import get_config
from cxa_jax.data.datasets import Split
from cxa_jax.data.epoch_schedule import EpochSchedule
from cxa_jax.data.pipeline import describe_epoch, epoch_labels, make_train_iterator, steps_per_epoch
from cxa_jax.errors import UserError


def make_split(cells: dict[tuple[int, str], int], seed: int = 0) -> Split:
    """A split with that many images of each (label, view), mixed; image i holds i."""
    rows = [cell for cell, count in cells.items() for _ in range(count)]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    labels, views = (np.array(column) for column in zip(*rows, strict=True))
    images = [{"image": np.full((2, 2, 1), i % 256, np.uint8)} for i in range(len(rows))]
    return Split("train", images, {"label": labels.astype(np.int32), "view": views})


def make_config(**changes):
    config = get_config().data
    config.update({"num_threads": 0, "sampling": "balanced"} | changes)
    return config


def draw_epochs(split: Split, config, num_epochs: int, batch_size: int = 16) -> list[np.ndarray]:
    """Rows of each epoch, padding left out."""
    steps = steps_per_epoch(split, config, batch_size)
    iterator = make_train_iterator(split, config, batch_size=batch_size, seed=3)
    epochs = []
    for _ in range(num_epochs):
        batches = [next(iterator) for _ in range(steps)]
        epochs.append(np.concatenate([batch["index"][batch["mask"]] for batch in batches]))
    return epochs


def count(split: Split, rows: np.ndarray) -> collections.Counter:
    return collections.Counter(zip(split.index["label"][rows].tolist(), split.index["view"][rows].tolist()))  # noqa: B905


def expect_counts(cells, num_negatives: int, positives_repeated: int) -> dict[tuple[int, str], int]:
    """The counts of an epoch in exact fractions: one image at a time goes where the most is still owed."""
    positives = {view: count for (label, view), count in cells.items() if label and count}
    available = sum(cells.get((0, view), 0) for view in positives)
    total = min(num_negatives, available)
    owed = {view: fractions.Fraction(total * count, sum(positives.values())) for view, count in positives.items()}
    drawn = {view: owed[view] // 1 for view in owed}
    while sum(drawn.values()) < total:
        drawn[max(sorted(owed), key=lambda view: owed[view] - drawn[view])] += 1
    expected = {(1, view): positives_repeated * count for view, count in positives.items()}
    return expected | {(0, view): count for view, count in drawn.items() if count}


def draw_as_before(labels: np.ndarray, seed: int, epoch: int, num_negatives: int | None) -> np.ndarray:
    """The order of runs made before positives could be repeated and strata drawn, word for word."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))
    negatives = np.flatnonzero(labels != 1)
    if num_negatives is not None and num_negatives < len(negatives):
        negatives = negatives[np.argsort(bits.random_raw(len(negatives)), kind="stable")[:num_negatives]]
    rows = np.concatenate([np.flatnonzero(labels == 1), negatives])
    return rows[np.argsort(bits.random_raw(len(rows)), kind="stable")]


@pytest.mark.parametrize("num_negatives", [None, 1, 60, 10_000])
@pytest.mark.parametrize("seed", [0, -7, 2**70])
def test_without_the_new_choices_the_order_is_the_old_one(num_negatives, seed):
    labels = np.random.default_rng().integers(0, 2, 150) * np.random.default_rng().integers(0, 2, 150)
    schedule = EpochSchedule(labels, batch_size=1000, seed=seed, num_negatives=num_negatives)
    for epoch in (0, 1, 5, 1000):
        rows, mask = schedule[epoch]
        np.testing.assert_array_equal(rows[mask], draw_as_before(labels, seed, epoch, num_negatives))


@pytest.mark.parametrize("strata", ["", "view"])
@pytest.mark.parametrize(("num_negatives", "positives_repeated"), [(0, 1), (37, 1), (60, 2), (9, 3), (100_000, 2)])
def test_counts_of_an_epoch(strata, num_negatives, positives_repeated):
    rng = np.random.default_rng()
    cells = {(1, view): int(rng.integers(1, 12)) for view in ("PA", "AP", "")}
    cells |= {(0, view): int(rng.integers(1, 90)) for view in ("PA", "AP", "", "LL")}
    split = make_split(cells)
    options = {"num_negatives": num_negatives, "positives_repeated": positives_repeated, "strata": strata}
    config = make_config(negatives_per_positive=3, **options)
    number = num_negatives or 3 * split.index["label"].sum()  # k of each positive, repeated or not
    epochs = draw_epochs(split, config, 3)
    for rows in epochs:
        times = np.bincount(rows, minlength=len(split.source))
        assert (times[split.index["label"] == 1] == positives_repeated).all()
        if strata:
            assert count(split, rows) == expect_counts(cells, number, positives_repeated)
        else:
            assert times[split.index["label"] == 0].max() == 1
            negatives = sum(n for (label, _), n in cells.items() if not label)
            assert (split.index["label"][rows] == 0).sum() == min(number, negatives)
        np.testing.assert_array_equal(np.sort(split.index["label"][rows]), np.sort(epoch_labels(split, config)))


def test_the_view_says_nothing_of_the_label_within_an_epoch():
    """Negatives are mostly PA, positives mostly AP; drawn by view, each view has the same share of positives."""
    cells = {(1, "AP"): 60, (1, "PA"): 30, (1, ""): 10, (0, "AP"): 300, (0, "PA"): 3000, (0, ""): 50}
    split = make_split(cells)
    for options, shares in (({}, None), ({"strata": "view"}, 0.25), ({"strata": "view", "positives_repeated": 2}, 0.4)):
        config = make_config(negatives_per_positive=3, **options)
        for rows in draw_epochs(split, config, 4):
            counts = count(split, rows)
            found = [counts[1, view] / (counts[0, view] + counts[1, view]) for view in ("AP", "PA", "")]
            if shares:
                np.testing.assert_allclose(found, shares, rtol=1e-12)
            else:
                assert found[0] > 2 * found[1]  # what the choice is for


def test_a_view_of_too_few_negatives_has_all_of_them_evenly():
    split = make_split({(1, "AP"): 20, (1, "PA"): 20, (0, "AP"): 7, (0, "PA"): 200})
    config = make_config(num_negatives=60, strata="view")
    short = np.flatnonzero((split.index["label"] == 0) & (split.index["view"] == "AP"))
    extra = set()
    for rows in draw_epochs(split, config, 10):
        times = np.bincount(rows, minlength=len(split.source))
        assert count(split, rows)[0, "AP"] == count(split, rows)[0, "PA"] == 30
        assert set(times[short]) == {4, 5} and times[split.index["view"] == "PA"].max() == 1
        extra.add(frozenset(short[times[short] == 5]))
    assert len(extra) > 3  # who stands in once more is drawn anew
    assert describe_epoch(split, config) == (
        "40 positives; negatives, view AP: 30 of 7, so some are repeated; view PA: 30 of 200"
    )


def test_the_epoch_is_told_in_words():
    split = make_split({(1, "AP"): 3, (1, ""): 1, (0, "AP"): 50, (0, ""): 1500})
    assert describe_epoch(split, make_config(sampling="all")) == "every image once"
    recipe = make_config(num_negatives=1500, positives_repeated=2)
    assert describe_epoch(split, recipe) == "8 positives; negatives, 1,500 of 1,550"
    assert "view unknown: 2 of 1,500" in describe_epoch(split, make_config(negatives_per_positive=2, strata="view"))


@pytest.mark.parametrize("num_taken", [1, 5, 9, 10, 23])
def test_resume_by_view_gives_the_same_batches(num_taken):
    split = make_split({(1, "AP"): 8, (1, "PA"): 9, (0, "AP"): 10, (0, "PA"): 80}, seed=1)
    config = make_config(strata="view", positives_repeated=2, num_threads=2)
    iterator = make_train_iterator(split, config, batch_size=11, seed=9)
    for _ in range(num_taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator)["index"] for _ in range(14)]
    config.num_threads = 0
    restored = make_train_iterator(split, config, batch_size=11, seed=9)
    restored.set_state(state)
    started = make_train_iterator(split, config, batch_size=11, seed=9, start_step=num_taken)
    for iterator in (restored, started):
        np.testing.assert_array_equal([next(iterator)["index"] for _ in range(14)], expected)


def test_a_view_of_positives_alone_is_refused():
    split = make_split({(1, "AP"): 3, (1, ""): 2, (0, "PA"): 20, (0, ""): 9})
    with pytest.raises(UserError, match="config.data.strata='view': the train split has positives of view AP and no"):
        make_train_iterator(split, make_config(strata="view"), batch_size=4, seed=0)
    make_train_iterator(split, make_config(), batch_size=4, seed=0)
