"""Cardio-XAttentionNet: backbone -> attention mapping -> weighted pooling -> head (Fig. 4, Table 3)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from cxa_jax.array_types import AttentionLogits, Features, Images, Logits, Pooled
from cxa_jax.errors import UserError
from cxa_jax.findings import CARDIOMEGALY, FINDINGS
from cxa_jax.models.amm import EPSILON, AttentionMappingMechanism, bound_logits
from cxa_jax.models.backbones import BACKBONES, select_implementation
from cxa_jax.models.initialization import glorot_uniform
from cxa_jax.models.kernel_tiles import is_available
from cxa_jax.models.layers import BATCH_NORM_MOMENTUM
from cxa_jax.models.strides import check_stride
from cxa_jax.pooling import FEATURES_ONLY, POOLINGS, gated_attention_logits

HEAD_WIDTH = 128
HEADS = ("mlp", "linear")
ATTENDED = ("normalized", "raw", "all_normalized")
LABELS = {"cardiomegaly": 1, "findings": len(FINDINGS)}  # how many labels, and attention maps, there are
UNBRANCHED = FEATURES_ONLY | {"gated", "pcam"}  # all other poolings read the attention branch of Table 3


class Head(nn.Module):
    """Pooled features [B, C] -> logits [B]: 'mlp' is Table 3's dropout, dense 128 ELU, dropout, dense 1.

    With a vector for each of M labels, [B, M, C] -> [B, M]: dense 128 is shared, the last weights are each label's own.
    """

    kind: str
    dropout: float
    num_labels: int = 1

    def setup(self) -> None:
        if self.kind == "mlp":
            self.dense1 = nn.Dense(HEAD_WIDTH, kernel_init=glorot_uniform)
        self.drop = nn.Dropout(self.dropout)
        self.logit = nn.Dense(self.num_labels, kernel_init=glorot_uniform)

    def __call__(self, pooled: Pooled, *, train: bool) -> Logits:
        x = pooled
        if self.kind == "mlp":
            x = nn.elu(self.dense1(self.drop(x, deterministic=not train)))
        logits = self.logit(self.drop(x, deterministic=not train))
        if pooled.ndim == 3:
            return jnp.diagonal(logits, axis1=1, axis2=2)
        return logits[:, CARDIOMEGALY if self.num_labels > 1 else 0]

    def score_cells(self, features: Features) -> AttentionLogits:
        """Apply the linear head to each cell: the attention logits of PCAM (Ye et al. 2020)."""
        return self.logit(features)


class GatedAttention(nn.Module):
    """The learnt parameters of gated attention (Ilse et al. 2018): F -> z [B, h, w, 1]."""

    @nn.compact
    def __call__(self, features: Features) -> AttentionLogits:
        size = (features.shape[-1], HEAD_WIDTH)
        tanh_kernel, gate_kernel = (
            self.param("tanh_kernel", glorot_uniform, size),
            self.param("gate_kernel", glorot_uniform, size),
        )
        kernel = self.param("kernel", glorot_uniform, (HEAD_WIDTH, 1))
        return gated_attention_logits(features, tanh_kernel, gate_kernel, kernel)


class CardioXAttentionNet(nn.Module):
    """Classify X-rays and say where: images [B, H, W, 3] -> (logits [B], intermediates).

    The intermediates are `features`, F or BN(F) as pooled, [B, h, w, C]; `attention_logits` z, bounded by
    `attention_bound` unless that is 0, and `attention` W = sigmoid(z), [B, h, w, 1]; `weights` p of the pooling,
    [B, h, w, 1 or C]; `pooled` f, [B, C]; all float32. Where no attention branch is built (`pooling='gap'` and others)
    z is 0 everywhere, for which Eq. (9) is the plain average.

    With `num_labels=14` every finding has its own map, pooled vector and last weights. All of the above is then
    cardiomegaly's, and `finding_logits` [B, 14] and `finding_attention` [B, h, w, 14] have all of them.

    Images that are arrays, not a jitted function's arguments, are refused outside `value_range`: [0, 1], or what the
    statistics of imported weights make of it (`cxa_jax.data.augment.find_value_range`).
    """

    backbone: nn.Module
    pooling: str = "amm"
    head: str = "mlp"
    attended: str = "normalized"
    dropout: float = 0.5
    value_range: tuple[float, float] = (0.0, 1.0)
    num_labels: int = 1
    batch_norm_momentum: float = BATCH_NORM_MOMENTUM
    attention_bound: float = 0.0

    def setup(self) -> None:
        if self.pooling not in UNBRANCHED:
            self.amm = AttentionMappingMechanism(self.num_labels, self.batch_norm_momentum)
        elif self.pooling == "gated":
            self.gate = GatedAttention()
        if self.pooling in UNBRANCHED and self.attended == "all_normalized":
            # The branch has its own.
            self.feature_norm = nn.BatchNorm(momentum=self.batch_norm_momentum, epsilon=EPSILON)
        self.classifier = Head(self.head, self.dropout, self.num_labels)

    def __call__(self, images: Images, *, train: bool = False) -> tuple[Logits, dict[str, jax.Array]]:
        if not isinstance(images, jax.core.Tracer):
            check_value_range(images, self.value_range)
        # From here on float32, whatever the backbone computes in: the pooling's ratio and the loss need the digits.
        features = self.backbone(images, train=train)
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        features, attention_logits = self._attend(features, train=train)
        attention_logits = bound_logits(attention_logits, self.attention_bound)
        pooled, weights = POOLINGS[self.pooling](features, attention_logits)
        logits, of_findings = self.classify(pooled, train=train), {}
        if self.num_labels > 1:
            of_findings = {"finding_logits": logits, "finding_attention": nn.sigmoid(attention_logits)}
            logits, pooled = logits[:, CARDIOMEGALY], pooled[:, CARDIOMEGALY]
            attention_logits, weights = (x[..., CARDIOMEGALY, None] for x in (attention_logits, weights))
        out = {
            "features": features,
            "attention_logits": attention_logits,
            "attention": nn.sigmoid(attention_logits),
            "weights": weights,
            "pooled": pooled,
        }
        return logits, out | of_findings

    def _attend(self, features: Features, *, train: bool) -> tuple[Features, AttentionLogits]:
        """Return the features to pool and the attention logits, from wherever this pooling takes them."""
        if self.pooling not in UNBRANCHED:
            normalized, attention_logits = self.amm(features, train=train)
            return features if self.attended == "raw" else normalized, attention_logits
        if self.attended == "all_normalized":
            features = self.feature_norm(features, use_running_average=not train)
        if self.pooling == "gated":
            return features, self.gate(features)
        if self.pooling == "pcam":
            return features, self.classifier.score_cells(features)
        return features, jnp.zeros((*features.shape[:3], 1), features.dtype)

    def classify(self, pooled: Pooled, *, train: bool = False) -> Logits:
        """Apply the head alone; `model.apply(variables, pooled, method='classify')` serves evidence maps."""
        return self.classifier(pooled, train=train)


def check_value_range(images: ArrayLike, value_range: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse images outside `value_range`. It reads values, so it stands outside jit.

    Args:
      images: numpy or JAX array of any shape; floating point, after the normalisation.
      value_range: least and greatest value that the normalisation gives.

    Raises:
      UserError: a value is outside or not finite; the message has the least and the greatest value seen.
    """
    values = np.asarray(images)  # numpy's own: a jax.Array met while tracing would become part of the graph
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())  # a NaN anywhere makes both NaN
    slack = 1e-5 * (value_range[1] - value_range[0])  # the statistics' own rounding
    if not (low >= value_range[0] - slack and high <= value_range[1] + slack):
        allowed = "[{:.4g}, {:.4g}]".format(*value_range)
        cure = "divide bytes by 255, or use cxa_jax.data.augment.normalize_images"
        raise UserError(f"images must be finite and in {allowed}, got values from {low:g} to {high:g}; {cure}")


def check_model(config: ConfigDict) -> None:
    """Check `config.model` without touching a device.

    Raises:
      UserError: a field has a value that names nothing, or two do not go together; the message has what there is.
    """
    for field, choices in (
        ("backbone", BACKBONES),
        ("pooling", POOLINGS),
        ("head", HEADS),
        ("attended", ATTENDED),
        ("labels", LABELS),
        ("dtype", ("float32", "bfloat16")),
    ):
        if config[field] not in choices:
            raise UserError(f"config.model.{field}={config[field]!r} is not one of {', '.join(choices)}")
    if config.pooling == "pcam" and config.head != "linear":
        raise UserError("config.model.pooling='pcam' shares a linear head with its map: set --config.model.head=linear")
    if config.labels == "findings" and (config.pooling in UNBRANCHED or config.head != "mlp"):
        raise UserError(
            "config.model.labels='findings' gives each finding its own attention map: it needs --config.model.head=mlp "
            f"and a pooling with the attention branch, such as amm; got {config.head} and {config.pooling}"
        )
    check_stride(config.stride, config.stride_by)
    for field in ("dropout", "batch_norm_momentum"):
        if not 0 <= config[field] < 1:
            raise UserError(f"config.model.{field}={config[field]} must be at least 0 and below 1")
    if not 0 <= config.attention_bound < math.inf:
        raise UserError(f"config.model.attention_bound={config.attention_bound} must be at least 0; 0 bounds nothing")
    if config.attention_bound and config.pooling in FEATURES_ONLY:
        raise UserError(
            f"config.model.attention_bound={config.attention_bound} needs attention, "
            f"and config.model.pooling={config.pooling!r} has none"
        )


def create_model(config: ConfigDict, *, remat: bool = False) -> CardioXAttentionNet:
    """Build the network of `config.model`, with `remat` of less memory to train; raises as `check_model`."""
    check_model(config)
    backbone = BACKBONES[config.backbone](
        dtype=jnp.dtype(config.dtype),
        implementation=select_implementation(
            config.implementation, config.backbone, config.dtype, jax.default_backend(), is_available()
        ),
        remat=remat,
        **{field: config[field] for field in ("stride", "stride_by", "batch_norm_momentum")},
    )
    return CardioXAttentionNet(
        backbone,
        config.pooling,
        config.head,
        config.attended,
        config.dropout,
        num_labels=LABELS[config.labels],
        batch_norm_momentum=config.batch_norm_momentum,
        attention_bound=config.attention_bound,
    )
