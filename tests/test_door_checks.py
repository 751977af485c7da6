"""Rules at the door: each fires where it should, none on an image of the training set's kind."""

import numpy as np
import pytest
import tiny
from PIL import Image

from cxa_jax.data.door_checks import check_image
from cxa_jax.data.images import GreyImage, load_grey
from cxa_jax.data.input_statistics import (
    FILE,
    compute_input_statistics,
    correlate,
    describe_image,
    load_input_statistics,
    save_input_statistics,
)
from cxa_jax.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def chests():
    """Images of one kind: a bright middle, dark sides, a bright ground, noise."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    shape = 90 + 100 * np.exp(-(((columns - 0.5) / 0.15) ** 2)) + 50 * rows
    split = tiny.make_split("train", 60, 0, SIZE)
    rng = np.random.default_rng(0)
    for record in split.source:
        noisy = shape * rng.uniform(0.8, 1.0) + rng.normal(0, 8, (SIZE, SIZE))
        record["image"] = np.clip(noisy, 0, 255).astype(np.uint8)[..., None]
    return split


@pytest.fixture(scope="module")
def statistics(chests):
    return compute_input_statistics(chests, "abc")


def check(pixels, statistics, width=SIZE, height=SIZE, notes=()):
    return check_image(GreyImage(pixels, "L", width, height, notes), statistics)


def rules(found):
    return {phrase.split(":")[0] for phrase in found}


def test_training_images_pass(chests, statistics):
    flagged = [check(record["image"][..., 0], statistics) for record in chests.source]
    assert sum(map(bool, flagged)) <= 12  # least and greatest of each of six numbers lie outside 0.1-99.9 %
    assert not set.union(*map(rules, flagged)) - {"unusual"}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("inverted", lambda image: 255 - image),
        ("blank", lambda image: np.full_like(image, 70)),
        ("blank", lambda image: image // 32 + 100),
        ("unusual", lambda image: image // 3),
        ("unusual", lambda image: np.random.default_rng(1).permutation(image.ravel()).reshape(image.shape)),
    ],
)
def test_changed_pixels_are_noticed(chests, statistics, rule, change):
    assert rules(check(change(chests.source[5]["image"][..., 0]), statistics)) == {rule}


def test_shape_rules_need_no_statistics(chests):
    pixels = chests.source[0]["image"][..., 0]
    assert rules(check(pixels, None, width=63, height=64)) == {"small"}
    assert rules(check(pixels, None, width=151, height=100)) == {"oblong"}
    assert check(pixels, None, width=150, height=100) == []
    assert check(pixels, None, notes=("its view",)) == ["note: its view"]


def test_colour_is_noticed_and_grey_copies_are_not(tmp_path, chests):
    grey = Image.fromarray(chests.source[0]["image"][..., 0])
    grey.convert("RGBA").save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "grey.jpg", quality=80)
    colour = np.asarray(grey.convert("RGB")).copy()
    colour[:20, :20, 0] = 255 - colour[:20, :20, 0] // 2
    Image.fromarray(colour).save(tmp_path / "colour.png")
    assert load_grey(tmp_path / "grey.png", SIZE).notes == load_grey(tmp_path / "grey.jpg", SIZE).notes == ()
    assert "colour" in load_grey(tmp_path / "colour.png", SIZE).notes[0]


def test_frames_are_noticed(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    image = load_grey(tmp_path / "a.tiff", 8)
    assert image.notes == ("the first of 2 frames",) and image.pixels.max() == 10


def test_described_numbers(statistics):
    pixels = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE), np.uint8)
    described = describe_image(pixels, statistics.thumbnail)
    assert described["mean"] == pytest.approx(pixels.mean())
    assert described["median"] == np.median(pixels)
    blocks = pixels.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    expected = np.corrcoef(blocks.ravel(), statistics.thumbnail.ravel())[0, 1]
    assert described["similarity"] == pytest.approx(expected, abs=1e-4)
    assert correlate(np.ones((3, 3)), blocks[:3, :3]) == 0


def test_statistics_round_trip(statistics, tmp_path):
    assert load_input_statistics(tmp_path) is None
    save_input_statistics(statistics, tmp_path)
    loaded = load_input_statistics(tmp_path)
    assert loaded.ranges == statistics.ranges and loaded.num_images == 60 and loaded.fingerprint == "abc"
    np.testing.assert_allclose(loaded.thumbnail, statistics.thumbnail, atol=1e-3)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_input_statistics(tmp_path)
