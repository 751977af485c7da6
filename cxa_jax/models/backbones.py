"""The backbones by the names that configs use (Table 2), and the one place that chooses their graph by platform."""

from cxa_jax.errors import UserError
from cxa_jax.models.densenet import DenseNet121, DenseNet201
from cxa_jax.models.inception_resnet_v2 import InceptionResNetV2
from cxa_jax.models.resnet import ResNet50

BACKBONES = {
    "densenet121": DenseNet121,
    "densenet201": DenseNet201,
    "resnet50": ResNet50,
    "inception_resnet_v2": InceptionResNetV2,
}
IMPLEMENTATIONS = ("auto", "plain", "fused")
FUSED_PLATFORMS = ("cpu",)  # where the fused operations were measured to be the faster ones


def select_implementation(implementation: str, platform: str) -> str:
    """Resolve 'auto' to 'fused' or 'plain' by platform ('cpu', 'gpu', ...); the other two stand for themselves.

    Raises:
      UserError: `implementation` is none of the three.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"config.model.implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        return "fused" if platform in FUSED_PLATFORMS else "plain"
    return implementation
