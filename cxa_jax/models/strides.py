"""The distance between neighbouring cells as a choice: which strides there are, and the ways to them.

The networks end at 32 px a cell. Of finer ones 'cut' lets the network end after the last stage of that stride, so there
are fewer parameters and each cell sees less of the image.
"""

from cxa_jax.errors import UserError

STRIDES = (32, 16, 8)  # px; the first is the whole network's
STRIDE_BY = ("cut", "dilate")


def check_stride(stride: int, stride_by: str) -> None:
    """Raise UserError unless a backbone can have this stride in this way."""
    if stride not in STRIDES:
        raise UserError(f"config.model.stride={stride!r} is not one of {', '.join(map(str, STRIDES))}")
    if stride_by not in STRIDE_BY:
        raise UserError(f"config.model.stride_by={stride_by!r} is not one of {', '.join(STRIDE_BY)}")


def is_cut(stride: int, stride_by: str) -> bool:
    """Return whether the network ends before its last stage."""
    return stride_by == "cut" and stride < STRIDES[0]
