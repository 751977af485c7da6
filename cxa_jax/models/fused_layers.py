"""Layers on the fused operations, with the variables of nn.Conv and nn.BatchNorm."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cxa_jax.models import fused_norms, norm_kernel
from cxa_jax.models.fused_convolutions import Pair, conv_1x1, conv_images, conv_windows
from cxa_jax.models.tracing import traced_once

BATCH_NORM_MOMENTUM = 0.99  # Keras' default, of networks that no config builds
MIN_CHANNELS = 16  # of a kernel's input: below, as on an image, one product for all its cells, not one for each


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[Pair],
    *,
    rhs_dilation: Sequence[int] = (1, 1),
    **options,
) -> jax.Array:
    """Convolve in place of lax.conv_general_dilated inside nn.Conv; without groups.

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C, D].
      strides: along H and W.
      padding: 'SAME', 'VALID' or pairs (low, high).
      rhs_dilation: px between neighbouring cells of the kernel, along H and W.
      options: the rest of what nn.Conv hands over, as it is by default.
    """
    if kernel.shape[:2] == (1, 1):
        return conv_1x1(x[:, :: strides[0], :: strides[1]], kernel)
    if isinstance(padding, str):
        spans = [step * (n - 1) + 1 for n, step in zip(kernel.shape[:2], rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(x.shape[1:3], spans, strides, padding)
    strides, padding, dilation = tuple(strides), tuple(map(tuple, padding)), tuple(rhs_dilation)
    if kernel.shape[2] < MIN_CHANNELS and dilation == (1, 1):
        return conv_images(x, kernel, strides, padding)
    return conv_windows(x, kernel, strides, padding, dilation)


class Norm(nn.Module):
    """Batch norm with the variables of nn.BatchNorm: scale (unless left out) and bias, running mean and var.

    Attributes:
      num_features: channels.
      use_scale: if False, the scale is 1.
      momentum: share of the running moments that a training step leaves as it was.
    """

    num_features: int
    use_scale: bool = True
    momentum: float = BATCH_NORM_MOMENTUM

    def setup(self):
        shape = (self.num_features,)
        self.scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else jnp.ones(shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def affine(self) -> fused_norms.Affine:
        """Return the learned scale and bias."""
        return fused_norms.Affine(self.scale, self.bias)

    def running(self) -> fused_norms.Moments:
        """Return the running moments."""
        return fused_norms.Moments(self.mean.value, self.var.value)

    def update(self, moments: fused_norms.Moments) -> None:
        """Move the running moments towards the batch's, as nn.BatchNorm does: not while initialising."""
        if self.is_initializing():
            return
        self.mean.value, self.var.value = _move(self.running(), moments, self.momentum)

    def __call__(
        self, x: jax.Array, moments: fused_norms.Moments | None, epsilon: float, *, relu: bool, kernels: bool = False
    ) -> jax.Array:
        """Normalise x [B, H, W, C] by its moments and note them, or by the running ones if there are none; then ReLU.

        The moments are an argument because who made x may know them already (fused_dense_block.py). `kernels` undoes
        norm and ReLU by norm_kernel.py, on a GPU.
        """
        if moments is None:
            return fused_norms.apply_affine(
                x, fused_norms.fold_batch_norm(self.running(), self.affine(), epsilon), relu=relu
            )
        self.update(moments)
        normalize = fused_norms.normalize_relu if relu else fused_norms.normalize
        if relu and kernels:
            normalize = norm_kernel.normalize_relu
        return normalize(x, moments, self.affine(), epsilon)


@partial(traced_once, static_argnames="momentum")
def _move(running, batch, momentum):
    def move(old, new):
        return momentum * old + (1 - momentum) * new

    return jax.tree.map(move, running, lax.stop_gradient(batch))
