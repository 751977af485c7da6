"""Cardio-XAttentionNet: backbone -> attention mapping -> weighted pooling -> head (Fig. 4, Table 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from cxa_jax.array_types import AttentionLogits, Features, Images, Logits, Pooled
from cxa_jax.errors import UserError
from cxa_jax.models.amm import AttentionMappingMechanism
from cxa_jax.models.backbones import BACKBONES, select_implementation
from cxa_jax.models.layers import GLOROT
from cxa_jax.pooling import POOLINGS, gated_attention_logits

HEAD_WIDTH = 128
HEADS = ("mlp", "linear")
ATTENDED = ("normalized", "raw")
BRANCHED = ("amm", "softmax")  # the poolings that read the attention branch of Table 3


class Head(nn.Module):
    """Pooled features [B, C] -> logits [B]: 'mlp' is Table 3's dropout, dense 128 ELU, dropout, dense 1."""

    kind: str
    dropout: float

    def setup(self) -> None:
        if self.kind == "mlp":
            self.dense1 = nn.Dense(HEAD_WIDTH, kernel_init=GLOROT)
        self.drop = nn.Dropout(self.dropout)
        self.logit = nn.Dense(1, kernel_init=GLOROT)

    def __call__(self, pooled: Pooled, *, train: bool) -> Logits:
        x = pooled
        if self.kind == "mlp":
            x = nn.elu(self.dense1(self.drop(x, deterministic=not train)))
        return self.logit(self.drop(x, deterministic=not train))[:, 0]

    def score_cells(self, features: Features) -> AttentionLogits:
        """Apply the linear head to each cell: the attention logits of PCAM (Ye et al. 2020)."""
        return self.logit(features)


class GatedAttention(nn.Module):
    """The learnt parameters of gated attention (Ilse et al. 2018): F -> z [B, h, w, 1]."""

    @nn.compact
    def __call__(self, features: Features) -> AttentionLogits:
        size = (features.shape[-1], HEAD_WIDTH)
        tanh_kernel, gate_kernel = self.param("tanh_kernel", GLOROT, size), self.param("gate_kernel", GLOROT, size)
        kernel = self.param("kernel", GLOROT, (HEAD_WIDTH, 1))
        return gated_attention_logits(features, tanh_kernel, gate_kernel, kernel)


class CardioXAttentionNet(nn.Module):
    """Classify X-rays and say where: images [B, H, W, 3] -> (logits [B], intermediates).

    The intermediates are `features`, F or BN(F) as pooled, [B, h, w, C]; `attention_logits` z and `attention`
    W = sigmoid(z), [B, h, w, 1]; `weights` p of the pooling, [B, h, w, 1 or C]; `pooled` f, [B, C]; all float32. Where
    no attention branch is built (`pooling='gap'` and others) z is 0 everywhere, for which Eq. (9) is the plain average.
    """

    backbone: nn.Module
    pooling: str = "amm"
    head: str = "mlp"
    attended: str = "normalized"
    dropout: float = 0.5

    def setup(self) -> None:
        if self.pooling in BRANCHED:
            self.amm = AttentionMappingMechanism()
        elif self.pooling == "gated":
            self.gate = GatedAttention()
        self.classifier = Head(self.head, self.dropout)

    def __call__(self, images: Images, *, train: bool = False) -> tuple[Logits, dict[str, jax.Array]]:
        # From here on float32, whatever the backbone computes in: the pooling's ratio and the loss need the digits.
        features = self.backbone(images, train=train)
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        features, attention_logits = self._attend(features, train=train)
        pooled, weights = POOLINGS[self.pooling](features, attention_logits)
        out = {
            "features": features,
            "attention_logits": attention_logits,
            "attention": nn.sigmoid(attention_logits),
            "weights": weights,
            "pooled": pooled,
        }
        return self.classify(pooled, train=train), out

    def _attend(self, features: Features, *, train: bool) -> tuple[Features, AttentionLogits]:
        """Return the features to pool and the attention logits, from wherever this pooling takes them."""
        if self.pooling in BRANCHED:
            normalized, attention_logits = self.amm(features, train=train)
            return normalized if self.attended == "normalized" else features, attention_logits
        if self.pooling == "gated":
            return features, self.gate(features)
        if self.pooling == "pcam":
            return features, self.classifier.score_cells(features)
        return features, jnp.zeros((*features.shape[:3], 1), features.dtype)

    def classify(self, pooled: Pooled, *, train: bool = False) -> Logits:
        """Apply the head alone; `model.apply(variables, pooled, method='classify')` serves evidence maps."""
        return self.classifier(pooled, train=train)


def check_value_range(images: ArrayLike) -> None:
    """Refuse images outside [0, 1]: the door for images that a user brings, before `model.apply`.

    It reads values, so it stands outside jit. The project's own pipeline needs no check, `normalize_images` ends in
    [0, 1]; and imported ImageNet weights want statistics that leave [0, 1] by design: check before `to_rgb`, not after.

    Args:
      images: numpy or JAX array of any shape; floating point in [0, 1], after the normalisation.

    Raises:
      UserError: a value is outside [0, 1] or not finite; the message has the least and the greatest value seen.
    """
    low, high = float(np.min(images)), float(np.max(images))  # a NaN anywhere makes both NaN
    if not (low >= 0 and high <= 1):
        cure = "divide bytes by 255, or use cxa_jax.data.augment.normalize_images"
        raise UserError(f"images must be finite and in [0, 1], got values from {low:g} to {high:g}; {cure}")


def create_model(config: ConfigDict) -> CardioXAttentionNet:
    """Build the network of `config.model`.

    Raises:
      UserError: a field has a value that names nothing; the message lists what there is.
    """
    for field, choices in (
        ("backbone", BACKBONES),
        ("pooling", POOLINGS),
        ("head", HEADS),
        ("attended", ATTENDED),
        ("dtype", ("float32", "bfloat16")),
    ):
        if config[field] not in choices:
            raise UserError(f"config.model.{field}={config[field]!r} is not one of {', '.join(choices)}")
    if config.pooling == "pcam" and config.head != "linear":
        raise UserError("config.model.pooling='pcam' shares a linear head with its map: set --config.model.head=linear")
    if not 0 <= config.dropout < 1:
        raise UserError(f"config.model.dropout={config.dropout} must be at least 0 and below 1")
    backbone = BACKBONES[config.backbone](
        dtype=jnp.dtype(config.dtype),
        implementation=select_implementation(config.implementation, jax.default_backend()),
        remat=config.remat,
    )
    return CardioXAttentionNet(backbone, config.pooling, config.head, config.attended, config.dropout)
