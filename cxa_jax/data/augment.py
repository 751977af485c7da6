"""From grey bytes to network input, on the device: normalisation, one random affine warp, brightness, three channels.

Pure jnp, to be called inside a jitted step:

    images = normalize_images(batch["image"], config.data.normalization)
    images = augment(image_keys(key, step, len(images)), images, config.augment)  # training only
    images = to_rgb(images, config.data.normalization)

Min-max comes before brightness, which it would cancel otherwise.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from ml_collections import ConfigDict

from cxa_jax.errors import UserError

# Channel-wise `scale * image + offset` for images in [0, 1]: what imported weights expect.
# The mode is Keras' name for it: torch = DenseNet, caffe (BGR order) = ResNet-50, tf = Inception-ResNet-v2.
CHANNEL_STATISTICS = {
    "imagenet_torch": ((1 / 0.229, 1 / 0.224, 1 / 0.225), (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
    "imagenet_caffe": ((255.0, 255.0, 255.0), (-103.939, -116.779, -123.68)),
    "imagenet_tf": ((2.0, 2.0, 2.0), (-1.0, -1.0, -1.0)),
    "xrv": ((2048.0, 2048.0, 2048.0), (-1024.0, -1024.0, -1024.0)),  # torchxrayvision's range
}
NORMALIZATIONS = ("min_max", "div255", *CHANNEL_STATISTICS)


def image_keys(root_key: jax.Array, step: jax.Array | int, batch_size: int) -> jax.Array:
    """Return one PRNG key for each row of the batch of `step`: fold_in(fold_in(root_key, step), row).

    Args:
      root_key: typed PRNG key of the run's augmentation.
      step: global training step, so that a resumed run draws what the unbroken one would have drawn.
      batch_size: B.

    Returns:
      Typed keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(root_key, step), jnp.arange(batch_size))


def normalize_images(images: jax.Array, method: str) -> jax.Array:
    """Scale grey bytes to [0, 1].

    'min_max': (x - min) / (max - min) over each image ("Data preprocessing"); a constant image becomes zeros.
    'div255' and the 'imagenet_*' methods: x / 255; `to_rgb` then applies the channel statistics of the latter.

    Args:
      images: uint8 [B, H, W, 1].
      method: one of NORMALIZATIONS.

    Returns:
      float32 [B, H, W, 1] in [0, 1].

    Raises:
      UserError: if `method` is unknown.
    """
    _check_method(method)
    pixels = images.astype(jnp.float32)
    if method != "min_max":
        return pixels / 255.0
    low = pixels.min(axis=(1, 2, 3), keepdims=True)
    span = pixels.max(axis=(1, 2, 3), keepdims=True) - low
    return (pixels - low) / jnp.where(span > 0, span, 1.0)


def to_rgb(images: jax.Array, method: str) -> jax.Array:
    """Copy the grey channel three times; 'imagenet_*' methods then standardise each channel.

    Args:
      images: float32 [B, H, W, 1] in [0, 1].
      method: one of NORMALIZATIONS.

    Returns:
      float32 [B, H, W, 3]; in [0, 1] for 'min_max' and 'div255', in BGR order for 'imagenet_caffe'.

    Raises:
      UserError: if `method` is unknown.
    """
    _check_method(method)
    if method in CHANNEL_STATISTICS:
        scale, offset = CHANNEL_STATISTICS[method]
        return images * jnp.array(scale, jnp.float32) + jnp.array(offset, jnp.float32)
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def find_value_range(method: str) -> tuple[float, float]:
    """Return the least and the greatest value that `to_rgb` can give for images in [0, 1].

    Raises:
      UserError: if `method` is unknown.
    """
    _check_method(method)
    scales, offsets = CHANNEL_STATISTICS.get(method, ((1.0,), (0.0,)))
    return min(offsets), max(scale + offset for scale, offset in zip(scales, offsets, strict=True))


def augment(keys: jax.Array, images: jax.Array, augment_config: ConfigDict) -> jax.Array:
    """Warp and re-light each image at random: shift, rotation, shear, zoom, flip, brightness ("Data augmentation").

    Args:
      keys: typed PRNG keys [B], one for each image.
      images: float32 [B, H, W, 1] in [0, 1], already normalised.
      augment_config: config.augment.

    Returns:
      float32 [B, H, W, 1], clipped to [0, 1]; the images themselves if augmentation is not enabled.

    Raises:
      UserError: if a range makes no sense.
    """
    if not augment_config.enabled:
        return images
    check_ranges(augment_config)

    def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
        warped = warp(image, sample_affine(key, augment_config, image.shape[:2]))
        return jnp.clip(warped * sample_brightness(key, augment_config), 0.0, 1.0)

    return jax.vmap(augment_one)(keys, images)


def sample_affine(key: jax.Array, augment_config: ConfigDict, size: tuple[int, int]) -> jax.Array:
    """Draw the affine map of one image from the ranges of the config, all uniformly and independently.

    Args:
      key: typed PRNG key of the image.
      augment_config: config.augment; shift is a fraction of the side, drawn for rows and columns; rotation and shear in
        degrees, +-; zoom is drawn for each axis from [1 - zoom, 1 + zoom]; a flip has probability 1/2 where selected.
      size: (H, W) in px.

    Returns:
      float32 [2, 3], see `compose_affine`.
    """
    signed = _draw(key)
    return compose_affine(
        rotation=jnp.deg2rad(augment_config.rotation_deg * signed[0]),
        shift=augment_config.shift * signed[1:3] * jnp.array(size, jnp.float32),
        shear=jnp.deg2rad(augment_config.shear_deg * signed[3]),
        zoom=1.0 + augment_config.zoom * signed[4:6],
        flip=(signed[6] < 0.0) & augment_config.horizontal_flip,
        size=size,
    )


def sample_brightness(key: jax.Array, augment_config: ConfigDict) -> jax.Array:
    """Draw the brightness factor of one image uniformly from config.augment.brightness, independent of its affine."""
    low, high = augment_config.brightness
    return low + (high - low) * (0.5 + 0.5 * _draw(key)[7])


def compose_affine(
    *, rotation: jax.Array, shift: jax.Array, shear: jax.Array, zoom: jax.Array, flip: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Compose one map from output to input pixels, as Keras' ImageDataGenerator does.

    On (x, y) = (column, row), about the centre of the image (side / 2 - 0.5):

        input = Rotation . Shift . Shear . Zoom . Flip . output
        Rotation = [[cos r, -sin r], [sin r, cos r]],  Shear = [[1, -sin s], [0, cos s]],  Zoom = diag(zx, zy)

    The map pulls: zoom > 1 shows more than the image (shrinks the chest), a positive shift moves it up and left.
    Deviation: Keras centres a non-square image with height and width swapped, and scales a shift along one axis by the
    side of the other; here each axis uses its own side. For square images nothing differs.

    Args:
      rotation: r in radians.
      shift: [2], (rows, columns) in px.
      shear: s in radians.
      zoom: [2], factors (rows, columns).
      flip: bool, mirror left and right.
      size: (H, W) in px.

    Returns:
      float32 [2, 3]: (input row, input column) = matrix @ (output row, output column, 1).
    """
    cos, sin = jnp.cos(rotation), jnp.sin(rotation)
    rotate = jnp.array([[cos, sin], [-sin, cos]])  # rows and columns swapped against the docstring's (x, y)
    skew = jnp.array([[jnp.cos(shear), 0.0], [-jnp.sin(shear), 1.0]])
    mirror = jnp.where(flip, jnp.array([1.0, -1.0]), 1.0)
    linear = _matmul(rotate, skew) * (zoom * mirror)
    centre = (jnp.array(size, jnp.float32) - 1.0) / 2.0
    offset = centre + _matmul(rotate, shift) - _matmul(linear, centre)
    return jnp.concatenate([linear, offset[:, None]], axis=1)


def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Resample an image bilinearly at matrix @ (row, column, 1); outside, the nearest edge pixel counts.

    Args:
      image: float32 [H, W, 1].
      matrix: float32 [2, 3] from output to input pixels.

    Returns:
      float32 [H, W, 1].
    """
    height, width, _ = image.shape
    rows = jnp.arange(height, dtype=jnp.float32)[:, None]
    columns = jnp.arange(width, dtype=jnp.float32)[None, :]
    # Elementwise, not as a matrix product: accelerators may round those to fewer bits, and pixels would jitter.
    source = [m[0] * rows + m[1] * columns + m[2] for m in matrix]
    return map_coordinates(image[..., 0], source, order=1, mode="nearest")[..., None]


def _draw(key: jax.Array) -> jax.Array:
    # All numbers of an image at once: 0-6 for the affine, 7 for brightness. XLA merges the two calls, and each
    # further draw would cost about half a second of compile time.
    return jax.random.uniform(key, (8,), minval=-1.0, maxval=1.0)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _check_method(method: str) -> None:
    if method not in NORMALIZATIONS:
        raise UserError(f"Unknown normalisation '{method}'; choose one of {', '.join(NORMALIZATIONS)}.")


def check_ranges(config: ConfigDict) -> None:
    """Raise UserError if a range of config.augment makes no sense."""
    for name, limit in (("shift", 1), ("rotation_deg", 360), ("shear_deg", 90), ("zoom", 1)):
        if not 0 <= config[name] < limit:
            raise UserError(f"config.augment.{name} is {config[name]}; it must be at least 0 and below {limit}.")
    if len(config.brightness) != 2 or not 0.0 <= config.brightness[0] <= config.brightness[1]:
        raise UserError(f"config.augment.brightness is {config.brightness}; it must be (low, high), 0 <= low <= high.")
