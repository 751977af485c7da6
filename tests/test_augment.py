"""The warp against scipy, the composition against Keras' matrices, normalisations against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from ml_collections import ConfigDict

from configs.dense121 import get_config
from cxa_jax.data.augment import (
    NORMALIZATIONS,
    augment,
    compose_affine,
    image_keys,
    normalize_images,
    sample_affine,
    to_rgb,
    warp,
)
from cxa_jax.errors import UserError

KEYS = image_keys(jax.random.key(0), 0, 400)
IDENTITY = {"shift": 0.0, "rotation_deg": 0.0, "shear_deg": 0.0, "zoom": 0.0, "brightness": (1.0, 1.0)}


def make_config(**changes) -> ConfigDict:
    config = get_config().augment
    config.update(changes)
    return config


def random_images(seed: int, shape=(4, 20, 24, 1)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def run(keys, images, config):
    """`augment` as a step calls it; eager vmap would compile every operation by itself."""
    return jax.jit(lambda keys, images: augment(keys, images, config))(keys, images)


def keras_matrix(theta, tx, ty, shear, zx, zy, height, width) -> np.ndarray:
    """ImageDataGenerator's matrix on (x, y), centred on each axis by its own side, as scipy's on (row, column)."""
    rotation = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    shift = np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])
    skew = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    centre = np.array([[1, 0, width / 2 - 0.5], [0, 1, height / 2 - 0.5], [0, 0, 1]])
    on_xy = centre @ rotation @ shift @ skew @ np.diag([zx, zy, 1]) @ np.linalg.inv(centre)
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    return (swap @ on_xy @ swap)[:2]


def scipy_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    linear, offset = matrix[:, :2], matrix[:, 2]
    return scipy.ndimage.affine_transform(image.astype(np.float64), linear, offset, order=1, mode="nearest")


@pytest.mark.parametrize("size", [(16, 16), (31, 20), (24, 57), (96, 96)])
def test_warp_equals_scipy_on_random_matrices(size):
    rng = np.random.default_rng(sum(size))
    for _ in range(5):
        image = rng.random((*size, 1), dtype=np.float32)
        matrix = np.concatenate([np.eye(2) + rng.normal(0, 0.3, (2, 2)), rng.normal(0, 8, (2, 1))], axis=1)
        expected = scipy_warp(image[..., 0], matrix)
        np.testing.assert_allclose(jax.jit(warp)(image, jnp.float32(matrix))[..., 0], expected, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_composition_equals_keras(size):
    rng = np.random.default_rng(1)
    compose = jax.jit(compose_affine, static_argnames="size")
    for _ in range(5):
        theta, shear = rng.uniform(-0.5, 0.5, 2)
        tx, ty = rng.uniform(-5, 5, 2)
        zx, zy = rng.uniform(0.8, 1.2, 2)
        matrix = compose(
            rotation=jnp.float32(theta),
            shift=jnp.float32([ty, tx]),
            shear=jnp.float32(shear),
            zoom=jnp.float32([zy, zx]),
            flip=False,
            size=size,
        )
        np.testing.assert_allclose(matrix, keras_matrix(theta, tx, ty, shear, zx, zy, *size), atol=2e-5)


def test_flip_mirrors_the_warped_image():
    image = random_images(2)[0]
    draws = {"rotation": 0.1, "shift": jnp.array([2.0, -1.0]), "shear": 0.05, "zoom": jnp.array([0.9, 1.1])}
    move = jax.jit(lambda flip: warp(image, compose_affine(**draws, flip=flip, size=image.shape[:2])))
    straight, mirrored = move(False), move(True)
    np.testing.assert_allclose(mirrored, straight[:, ::-1], atol=1e-5)
    assert np.abs(mirrored - straight).max() > 0.1


def test_horizontal_flip_happens_to_half_of_the_images_and_only_if_selected():
    images = random_images(3, (1, 8, 8, 1)).repeat(400, axis=0)
    keys = KEYS
    flipped = run(keys, images, make_config(**IDENTITY, horizontal_flip=True))
    is_flipped = np.isclose(flipped, images[:, :, ::-1], atol=1e-5).all((1, 2, 3))
    is_same = np.isclose(flipped, images, atol=1e-5).all((1, 2, 3))
    assert (is_flipped ^ is_same).all()
    assert 150 < is_flipped.sum() < 250
    np.testing.assert_allclose(run(keys, images, make_config(**IDENTITY)), images, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 20, 24, 1), (2, 224, 224, 1)])
def test_identity_ranges_are_the_identity(shape):
    images = random_images(4, shape)
    keys = KEYS[: shape[0]]
    np.testing.assert_allclose(run(keys, images, make_config(**IDENTITY)), images, atol=1e-6)


def test_disabled_changes_nothing_whatever_the_ranges():
    images = random_images(5)
    keys = KEYS[: len(images)]
    np.testing.assert_array_equal(augment(keys, images, make_config(enabled=False)), images)


@pytest.mark.parametrize("name", ["shift", "rotation_deg", "shear_deg", "zoom"])
def test_each_range_alone_is_filled_and_kept(name):
    """Recover the drawn parameter from the matrix of 300 keys."""
    limit = {"shift": 0.1, "rotation_deg": 20.0, "shear_deg": 15.0, "zoom": 0.25}[name]
    config = make_config(**(IDENTITY | {name: limit}))
    keys = KEYS[:300]
    matrices = np.asarray(jax.jit(jax.vmap(lambda key: sample_affine(key, config, (50, 80))))(keys))
    drawn = {
        "shift": matrices[:, :, 2] / np.array([50, 80]),
        "rotation_deg": np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0])),
        "shear_deg": np.rad2deg(np.arcsin(-matrices[:, 1, 0])),
        "zoom": matrices[:, [0, 1], [0, 1]] - 1.0,
    }[name]
    assert np.abs(drawn).max() <= limit * (1 + 1e-4)
    assert drawn.max() > 0.95 * limit and drawn.min() < -0.95 * limit
    if drawn.ndim == 2:
        assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2  # rows and columns are drawn apart


def test_brightness_multiplies_within_its_range_and_clips():
    images = np.full((300, 4, 4, 1), 0.8, np.float32)
    keys = KEYS[:300]
    config = make_config(**(IDENTITY | {"brightness": (0.7, 1.5)}))
    values = np.asarray(run(keys, images, config))[:, 0, 0, 0]
    assert values.min() >= 0.8 * 0.7 - 1e-6 and values.max() == 1.0
    factors = values[values < 1.0] / 0.8
    assert factors.min() < 0.73 and factors.max() > 1.2
    assert abs((values == 1.0).mean() - (1.5 - 1.25) / 0.8) < 0.08  # factors above 1.25 saturate


def test_brightness_survives_min_max():
    """Normalised first: the mean of the network's input moves with the drawn factor."""
    raw = np.random.default_rng(6).integers(0, 128, (64, 8, 8, 1), dtype=np.uint8)
    normalized = normalize_images(raw, "min_max")
    config = make_config(**(IDENTITY | {"brightness": (0.5, 0.9)}))
    augmented = run(KEYS[:64], normalized, config)
    ratio = augmented.mean((1, 2, 3)) / normalized.mean((1, 2, 3))
    assert 0.5 <= ratio.min() < 0.55 and 0.85 < ratio.max() <= 0.9 + 1e-6


def test_output_stays_in_range_and_type():
    images = random_images(7, (8, 33, 21, 1))
    out = run(KEYS[:8], images, make_config(rotation_deg=45.0, shift=0.4, zoom=0.5))
    assert out.shape == images.shape and out.dtype == jnp.float32
    assert np.isfinite(out).all() and out.min() >= 0.0 and out.max() <= 1.0


def test_an_image_depends_on_its_own_key_only():
    images = random_images(8)
    keys = KEYS[: len(images)]
    config = make_config()
    together = run(keys, images, config)
    alone = jax.jit(lambda key, image: augment(key[None], image[None], config)[0])
    for row in range(len(images)):
        np.testing.assert_allclose(alone(keys[row], images[row]), together[row], atol=1e-5)


def test_different_keys_differ():
    images = random_images(9, (1, 20, 20, 1)).repeat(6, axis=0)
    out = np.asarray(run(KEYS[:6], images, make_config()))
    for a in range(6):
        for b in range(a):
            assert np.abs(out[a] - out[b]).max() > 1e-3


def test_image_keys_are_distinct_over_steps_and_rows_and_repeat():
    root = jax.random.key(8)
    keys_of = jax.jit(lambda step: jax.random.key_data(image_keys(root, step, 7)))
    keys = [tuple(np.asarray(k)) for step in range(5) for k in keys_of(step)]
    assert len(set(keys)) == 35
    np.testing.assert_array_equal(keys_of(3), jax.random.key_data(image_keys(root, 3, 7)))
    # A row's key does not depend on the size of the batch.
    np.testing.assert_array_equal(jax.random.key_data(image_keys(root, 2, 3)), keys_of(2)[:3])


def test_min_max_is_per_image_and_guards_constants():
    raw = np.random.default_rng(10).integers(20, 200, (3, 9, 7, 1), dtype=np.uint8)
    raw[1] = 77
    out = np.asarray(normalize_images(raw, "min_max"))
    for row in (0, 2):
        low, high = int(raw[row].min()), int(raw[row].max())
        np.testing.assert_allclose(out[row], (raw[row].astype(np.float64) - low) / (high - low), atol=1e-6)
        assert out[row].min() == 0.0 and out[row].max() == 1.0
    np.testing.assert_array_equal(out[1], 0.0)
    assert out.dtype == np.float32


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_channels_hold_what_the_backbone_expects(method):
    raw = np.random.default_rng(11).integers(0, 256, (2, 5, 6, 1), dtype=np.uint8)
    grey = raw.astype(np.float64).repeat(3, axis=-1)
    low, high = (f(grey, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    expected = {
        "min_max": (grey - low) / (high - low),
        "div255": grey / 255,
        "imagenet_torch": (grey / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        "imagenet_caffe": grey - [103.939, 116.779, 123.68],
        "imagenet_tf": grey / 127.5 - 1,
        "xrv": grey / 255 * 2048 - 1024,
    }[method]
    out = to_rgb(normalize_images(raw, method), method)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=max(2e-5, 2e-7 * np.abs(expected).max()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", -0.1),
        ("shift", 1.0),
        ("zoom", 1.0),
        ("rotation_deg", -1.0),
        ("shear_deg", 90.0),
        ("brightness", (1.5, 0.7)),
    ],
)
def test_senseless_ranges_are_refused_by_name(name, value):
    images = random_images(12)
    with pytest.raises(UserError, match=f"config.augment.{name}"):
        augment(KEYS[: len(images)], images, make_config(**{name: value}))


@pytest.mark.parametrize("function", [normalize_images, to_rgb])
def test_unknown_normalization_lists_the_choices(function):
    with pytest.raises(UserError, match="'z_score'.*min_max.*div255"):
        function(np.zeros((1, 4, 4, 1), np.uint8), "z_score")
