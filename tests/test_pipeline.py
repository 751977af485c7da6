"""Order, coverage, padding and resume of the batches, on tiny splits in memory."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.dense121 import get_config
from cxa_jax.data.datasets import Split
from cxa_jax.data.epoch_schedule import EpochSchedule
from cxa_jax.data.pipeline import PADDING, make_eval_iterator, make_train_iterator, steps_per_epoch
from cxa_jax.errors import UserError


def make_split(num_images: int, num_positives: int, side: int = 6, seed: int = 0) -> Split:
    """A split whose image i holds i in its first pixel."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_images, side, side, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(num_images)
    labels = np.zeros(num_images, np.int32)
    labels[rng.permutation(num_images)[:num_positives]] = 1
    return Split("train", [{"image": image} for image in images], {"label": labels})


def make_config(**changes):
    config = get_config().data
    config.update({"num_threads": 0} | changes)
    return config


def take(iterator, num_batches: int) -> list[dict]:
    return [next(iterator) for _ in range(num_batches)]


def valid_rows(batches: list[dict]) -> np.ndarray:
    return np.concatenate([batch["index"][batch["mask"]] for batch in batches])


def assert_same_batches(actual: list[dict], expected: list[dict]):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "mask", "index"}
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])


@pytest.mark.parametrize(("num_images", "batch_size"), [(20, 4), (23, 4), (3, 8), (17, 1)])
def test_an_epoch_is_every_image_once(num_images, batch_size):
    split, config = make_split(num_images, 3), make_config()
    steps = steps_per_epoch(split, config, batch_size)
    assert steps == -(-num_images // batch_size)
    iterator = make_train_iterator(split, config, batch_size=batch_size, seed=5)
    orders = [valid_rows(take(iterator, steps)) for _ in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(num_images))
    if num_images > 10:
        assert (orders[0] != orders[1]).any() and (orders[1] != orders[2]).any()
        assert (orders[0] != np.arange(num_images)).any()


def test_batches_hold_the_images_they_name():
    split = make_split(23, 5)
    for batch in take(make_train_iterator(split, make_config(), batch_size=4, seed=1), 9):
        assert batch["image"].shape == (4, 6, 6, 1) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and batch["index"].dtype == np.int32 and batch["mask"].dtype == np.bool_
        np.testing.assert_array_equal(batch["label"], split.index["label"][batch["index"]])
        for image, row in zip(batch["image"], batch["index"], strict=True):
            np.testing.assert_array_equal(image, split.source[row]["image"])


def test_last_batch_is_filled_from_the_start_of_the_same_epoch():
    split, config = make_split(10, 3), make_config()
    batches = take(make_train_iterator(split, config, batch_size=4, seed=3), 6)
    for first, _, last in (batches[:3], batches[3:]):
        np.testing.assert_array_equal(last["mask"], [True, True, False, False])
        np.testing.assert_array_equal(last["index"][2:], first["index"][:2])
        assert first["mask"].all()


def test_an_epoch_smaller_than_a_batch_wraps_round():
    batch = next(make_train_iterator(make_split(3, 1), make_config(), batch_size=8, seed=0))
    assert batch["mask"].sum() == 3
    np.testing.assert_array_equal(batch["index"], np.resize(batch["index"][:3], 8))


@pytest.mark.parametrize("negatives_per_positive", [1, 4])
def test_balanced_takes_all_positives_and_k_negatives_each(negatives_per_positive):
    split = make_split(60, 7)
    config = make_config(sampling="balanced", negatives_per_positive=negatives_per_positive)
    steps = steps_per_epoch(split, config, 8)
    assert steps == -(-7 * (1 + negatives_per_positive) // 8)
    iterator = make_train_iterator(split, config, batch_size=8, seed=2)
    drawn = []
    for _ in range(12):
        rows = valid_rows(take(iterator, steps))
        labels = split.index["label"][rows]
        assert labels.sum() == 7 and (labels == 0).sum() == 7 * negatives_per_positive
        assert len(set(rows)) == len(rows)
        drawn.append(frozenset(rows[labels == 0]))
    assert len(set(drawn)) > 10  # drawn anew every epoch
    assert len(frozenset.union(*drawn)) > 50 * (negatives_per_positive > 1)


def test_balanced_takes_every_negative_if_there_are_too_few():
    split, config = make_split(20, 8), make_config(sampling="balanced", negatives_per_positive=4)
    assert steps_per_epoch(split, config, 5) == 4
    rows = valid_rows(take(make_train_iterator(split, config, batch_size=5, seed=2), 4))
    np.testing.assert_array_equal(np.sort(rows), np.arange(20))


def test_balanced_mixes_the_classes_over_the_epoch():
    labels = make_split(4000, 400).index["label"]
    schedule = EpochSchedule(labels, batch_size=1000, seed=0, num_negatives=1600)
    rates = [labels[schedule[step][0]].mean() for step in range(2)]
    np.testing.assert_allclose(rates, 0.2, atol=0.04)


def test_every_row_lands_everywhere_equally_often():
    """Position of row 0 in 2,000 epochs of 10: chi-square with 9 degrees of freedom, 99.9 % point 27.9."""
    schedule = EpochSchedule(np.zeros(10), batch_size=10, seed=4, num_negatives=None)
    places = [int(np.flatnonzero(schedule[epoch][0] == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_the_seed_decides_the_order():
    split, config = make_split(40, 5), make_config()
    first, again, other = (take(make_train_iterator(split, config, batch_size=8, seed=s), 12) for s in (1, 1, 2))
    assert_same_batches(first, again)
    assert any((a["index"] != b["index"]).any() for a, b in zip(first, other, strict=True))
    next(make_train_iterator(split, config, batch_size=8, seed=-1))  # any integer will do


@pytest.mark.parametrize("sampling", ["all", "balanced"])
def test_the_number_of_threads_does_not_matter(sampling):
    split = make_split(50, 9)
    runs = []
    for num_threads in (0, 1, 2, 4):
        config = make_config(sampling=sampling, num_threads=num_threads)
        runs.append(take(make_train_iterator(split, config, batch_size=8, seed=7), 25))
    for run in runs[1:]:
        assert_same_batches(run, runs[0])


@pytest.mark.parametrize("num_taken", [0, 3, 7, 8, 15])
def test_resume_mid_epoch_gives_the_same_batches(num_taken):
    split, config = make_split(30, 6), make_config(num_threads=2)
    iterator = make_train_iterator(split, config, batch_size=4, seed=9)
    take(iterator, num_taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    for num_threads in (0, 2):
        config.num_threads = num_threads
        resumed = make_train_iterator(split, config, batch_size=4, seed=9)
        resumed.set_state(state)
        assert_same_batches(take(resumed, 12), expected)
    started = make_train_iterator(split, config, batch_size=4, seed=9, start_step=num_taken)
    assert_same_batches(take(started, 12), expected)


def test_set_state_goes_back_in_a_running_iterator():
    iterator = make_train_iterator(make_split(30, 6), make_config(num_threads=2), batch_size=4, seed=9)
    state = iterator.get_state()
    expected = take(iterator, 11)
    iterator.set_state(state)
    assert_same_batches(take(iterator, 11), expected)


def test_a_far_step_needs_none_before_it():
    split, config = make_split(30, 6), make_config()
    reads = []

    class Counting(list):
        def __getitem__(self, row):
            reads.append(row)
            return super().__getitem__(row)

    counted = Split("train", Counting(split.source), split.index)
    batch = next(make_train_iterator(counted, config, batch_size=4, seed=9, start_step=8 * 10**9 + 2))
    assert len(reads) == 4
    np.testing.assert_array_equal(np.sort(reads), np.sort(batch["index"]))


def test_orbax_keeps_the_state(tmp_path):
    split, config = make_split(30, 6), make_config(num_threads=1)
    iterator = make_train_iterator(split, config, batch_size=4, seed=9)
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 9)
        fresh = make_train_iterator(split, config, batch_size=4, seed=9)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same_batches(take(fresh, 9), expected)


@pytest.mark.parametrize(("num_images", "batch_size"), [(12, 4), (13, 4), (3, 8)])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_evaluation_is_row_order_with_padding(num_images, batch_size, num_threads):
    split = make_split(num_images, 2)
    batches = list(make_eval_iterator(split, batch_size=batch_size, num_threads=num_threads))
    assert len(batches) == -(-num_images // batch_size)
    np.testing.assert_array_equal(valid_rows(batches), np.arange(num_images))
    for batch in batches:
        assert batch["image"].shape == (batch_size, 6, 6, 1) and batch["image"].dtype == np.uint8
        real, padded = batch["mask"], ~batch["mask"]
        assert (batch["image"][padded] == 0).all() and (batch["label"][padded] == 0).all()
        assert (batch["index"][padded] == PADDING).all()
        np.testing.assert_array_equal(batch["image"][real, 0, 0, 0], batch["index"][real])
        np.testing.assert_array_equal(batch["label"][real], split.index["label"][batch["index"][real]])


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_while_reading_reaches_the_caller(num_threads):
    class Broken(list):
        def __getitem__(self, row):
            raise UserError("the prepared data are damaged")

    split = make_split(10, 2)
    broken = Split("train", Broken(split.source), split.index)
    with pytest.raises(UserError, match="damaged"):
        next(make_train_iterator(broken, make_config(num_threads=num_threads), batch_size=4, seed=0))


@pytest.mark.parametrize(
    ("split", "changes", "batch_size", "message"),
    [
        (make_split(0, 0), {}, 4, "no images"),
        (make_split(9, 0), {"sampling": "balanced"}, 4, "no positives"),
        (make_split(9, 2), {"sampling": "balanced", "negatives_per_positive": 0}, 4, "negatives_per_positive is 0"),
        (make_split(9, 2), {"sampling": "some"}, 4, "config.data.sampling is 'some'"),
        (make_split(9, 2), {}, 0, "batch size is 0"),
        (make_split(9, 2), {"num_threads": -1}, 4, "num_threads is -1"),
    ],
)
def test_senseless_requests_are_refused_by_name(split, changes, batch_size, message):
    with pytest.raises(UserError, match=message):
        make_train_iterator(split, make_config(**changes), batch_size=batch_size, seed=0)
