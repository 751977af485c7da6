"""Convolution, normalisation and pooling as Keras applications builds them, and the check at a backbone's door.

`implementation` is 'plain', Flax' own layer, or 'fused', the same function of the same variables on fused_layers.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.errors import UserError
from cxa_jax.models import fused_convolutions, fused_layers, fused_norms, fused_pools
from cxa_jax.models.fused_layers import BATCH_NORM_MOMENTUM
from cxa_jax.models.initialization import glorot_uniform

Apply = Callable[[nn.Module, jax.Array], jax.Array]


def check_images(images: jax.Array, min_size: int, name: str) -> None:
    """Refuse images that a backbone cannot take; reads shape and type alone, so it costs nothing in a jitted step.

    Args:
      images: what should be float [B, H, W, 3], H, W >= min_size.
      min_size: px, the backbone's least image side.
      name: of the backbone, for the message.

    Raises:
      UserError: another rank, number of channels, size or type; the message has what was seen.
    """
    seen = f"got {images.dtype} {list(images.shape)}"
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"{name} takes images [B, H, W, 3], {seen}; copy a grey channel three times")
    if min(images.shape[1:3]) < min_size:
        raise UserError(f"{name} needs images of at least {min_size} x {min_size} px, {seen}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"{name} takes floating-point images, {seen}; normalise first (cxa_jax.data.augment)")


def check_implementation(implementation: str, choices: Sequence[str] = ("plain", "fused")) -> None:
    """Raise UserError unless a backbone has this graph."""
    if implementation not in choices:
        raise UserError(f"model.implementation is {implementation!r}; give {' or '.join(map(repr, choices))}.")


def remat(apply: Apply) -> Apply:
    """Let `apply(module, x)` keep x alone for the backward pass and compute the rest again there.

    As nn.remat does, which by itself saves nothing on XLA:CPU: see `fused_convolutions.not_before`. First-order
    gradients only.
    """
    recomputing = nn.remat(apply)

    def forward(module: nn.Module, x: jax.Array) -> tuple[jax.Array, Callable]:
        return nn.vjp(recomputing, module, x)

    def backward(undo: Callable, g: jax.Array) -> tuple:
        # `undo` is a tree of what was kept: x and parameters. A kernel taken for an x would wait too, which is no harm.
        def wait(kept: jax.Array) -> jax.Array:
            return fused_convolutions.not_before(g, kept) if kept.ndim == 4 and kept.shape[0] == g.shape[0] else kept

        return jax.tree.map(wait, undo)(g)

    return nn.custom_vjp(apply, forward, backward)


def conv(
    num_features: int,
    kernel_size: int | Sequence[int] = 1,
    *,
    strides: int = 1,
    dilation: int = 1,
    padding: str | int | Sequence = "SAME",
    use_bias: bool = False,
    dtype: Any = None,
    implementation: str = "plain",
    convolve: Callable[..., jax.Array] | None = None,
    name: str | None = None,
) -> nn.Conv:
    """Create a convolution with a Glorot uniform kernel [kh, kw, C_in, num_features] and, if asked, a zero bias.

    `dilation` is px between neighbouring cells of the kernel. `dtype` is the compute type; None takes that of inputs
    and parameters together. `convolve` stands in for lax.conv_general_dilated, whatever the implementation.
    """
    if implementation == "fused" and convolve is None:
        convolve = fused_layers.convolve
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    return nn.Conv(
        num_features,
        size,
        strides,
        padding,
        kernel_dilation=dilation,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=glorot_uniform,
        conv_general_dilated=convolve,
        name=name,
    )


def batch_norm(
    *,
    train: bool,
    epsilon: float,
    momentum: float = BATCH_NORM_MOMENTUM,
    use_scale: bool = True,
    dtype: Any = None,
    name: str | None = None,
) -> nn.BatchNorm:
    """Create a batch norm: batch moments when `train`, running ones else; moments in float32 whatever `dtype`.

    `momentum` is the share of the running moments that a training step leaves as it was.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        use_scale=use_scale,
        dtype=dtype,
        name=name,
    )


def norm(
    x: jax.Array,
    *,
    relu: bool,
    train: bool,
    epsilon: float,
    momentum: float = BATCH_NORM_MOMENTUM,
    use_scale: bool = True,
    dtype: Any = None,
    implementation: str = "plain",
    name: str,
) -> jax.Array:
    """Apply `batch_norm` to [B, H, W, C], then ReLU if asked; its variables are those of the submodule `name`."""
    if implementation == "fused":
        moments = fused_norms.compute_moments(x) if train else None
        return fused_layers.Norm(x.shape[-1], use_scale, momentum, name=name)(x, moments, epsilon, relu=relu)
    x = batch_norm(train=train, epsilon=epsilon, momentum=momentum, use_scale=use_scale, dtype=dtype, name=name)(x)
    return nn.relu(x) if relu else x


def add_relu(x: jax.Array, shortcut: jax.Array, *, implementation: str = "plain") -> jax.Array:
    """Compute relu(x + shortcut)."""
    return fused_norms.add_relu(x, shortcut) if implementation == "fused" else nn.relu(x + shortcut)


def max_pool_3x3(
    x: jax.Array, *, strides: int = 2, dilation: int = 1, padding: int = 1, implementation: str = "plain"
) -> jax.Array:
    """Pool [B, H, W, C] by 3x3 maxima at stride 2, `padding` pixels on each side: 1 is Keras' ZeroPadding2D(1).

    The padding is -inf here and 0 in Keras: the same, because the pool always follows a ReLU. At stride 1 the cells of
    a window may be `dilation` pixels apart, without padding, in either implementation: lax has no gradient of that.
    """
    if strides == 1:
        return fused_pools.max_pool_dilated(x, dilation)
    if implementation == "fused":
        return fused_pools.max_pool_3x3(x, padding)
    return nn.max_pool(x, (3, 3), (2, 2), ((padding, padding),) * 2)
