"""The attention mapping mechanism's branch (Table 3, Fig. 4): features in, attention logits out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cxa_jax.models.layers import BATCH_NORM_MOMENTUM, batch_norm, conv
from cxa_jax.pooling import average_pool_2x2_same

WIDTHS = (128, 32, 16)
EPSILON = 1e-3


class AttentionMappingMechanism(nn.Module):
    """BN(F) -> three 1x1 convolutions with ELU -> 2x2 average pool, stride 1 -> 1x1 convolution = z.

    The sigmoid and the weighted average are `cxa_jax.pooling.gwap`, which works on z in log space; the paper's frozen
    convolution of ones, which copies W to all channels, is a broadcast and never stored (A4).

    Returns:
      normalized: BN(F), [B, h, w, C], which the paper's origin weights with W (A1).
      attention_logits: z, [B, h, w, num_maps], unbounded; W = sigmoid(z).
    """

    num_maps: int = 1  # the paper's one shared map, or one for each label (A3)
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        normalized = batch_norm(train=train, epsilon=EPSILON, momentum=self.batch_norm_momentum, name="norm")(features)
        x = normalized
        for i, width in enumerate(WIDTHS, start=1):
            x = nn.elu(conv(width, 1, use_bias=True, name=f"conv{i}")(x))
        x = average_pool_2x2_same(x)
        return normalized, conv(self.num_maps, 1, use_bias=True, name=f"conv{len(WIDTHS) + 1}")(x)


def bound_logits(attention_logits: jax.Array, bound: float) -> jax.Array:
    """Compute z -> b tanh(z / b), in (-b, b), of slope 1 at 0; with b = 0 z itself.

    W then stays off 0 and 1, so that no cell is ever without a gradient, and p of Eq. (9) within a ratio of e^b.
    """
    return bound * jnp.tanh(attention_logits / bound) if bound else attention_logits
