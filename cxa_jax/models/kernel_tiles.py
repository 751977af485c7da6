"""What the GPU kernels share: whether they run here, and how the pixels of [B, H, W, C] are cut into tiles.

The kernels are written in Pallas and compiled by Triton. On a processor they run as plain JAX, one operation after the
other, which is slow and for tests alone.
"""

import math

import jax

MIN_ROWS = 16  # pixels in a tile: Triton's matrix product takes no fewer


def is_available() -> bool:
    """Return whether the kernels run here: on a single NVIDIA GPU that multiplies bfloat16.

    Of several GPUs XLA would have to be told how a kernel is divided among them; there the plain graph is used.
    """
    device, capability = jax.devices()[0], getattr(jax.devices()[0], "compute_capability", "0")
    is_nvidia = device.platform == "gpu" and device.device_kind.startswith("NVIDIA")
    return is_nvidia and jax.device_count() == 1 and float(capability) >= 8


def interpret() -> bool:
    """Return whether kernels run as plain JAX."""
    return jax.default_backend() == "cpu"


def fills_tiles(shape: tuple[int, ...]) -> bool:
    """Return whether the pixels of [B, H, W, C] are a multiple of MIN_ROWS."""
    return shape[0] * shape[1] * shape[2] % MIN_ROWS == 0


def choose_rows(num_pixels: int, most: int) -> int:
    """Return the pixels in a tile: the largest power of two, `most` or less (itself one), that divides their number."""
    return math.gcd(num_pixels, most)


def count_own(num_tiles: int, program: jax.Array, num_programs: int) -> jax.Array:
    """Return how many of the tiles program, program + num_programs, ... there are."""
    return (num_tiles - program + num_programs - 1) // num_programs
