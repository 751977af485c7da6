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
IMPLEMENTATIONS = ("auto", "plain", "fused", "kernels")
FUSED_PLATFORMS = ("cpu",)  # where the fused operations were measured to be the faster ones
# What the GPU kernels are written for, and the types in which they were measured to be the faster ones.
KERNEL_BACKBONES, KERNEL_DTYPES = ("densenet121", "densenet201"), ("bfloat16",)


def select_implementation(implementation: str, backbone: str, dtype: str, platform: str, has_kernels: bool) -> str:
    """Resolve 'auto' to 'fused', 'kernels' or 'plain' by what was measured; these three stand for themselves.

    Args:
      implementation: of `config.model`.
      backbone: a name in BACKBONES.
      dtype: compute type.
      platform: jax' default backend, 'cpu' or 'gpu'.
      has_kernels: whether the GPU kernels run here (`kernel_tiles.is_available`).

    Raises:
      UserError: `implementation` is none of the four, or 'kernels' where they do not run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"config.model.implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    fits = has_kernels and backbone in KERNEL_BACKBONES
    if implementation == "kernels" and not fits:
        raise UserError(
            "config.model.implementation='kernels' is for the DenseNets on a single NVIDIA GPU of compute capability 8 "
            f"or higher; here it is {backbone} on {platform}. Leave it at 'auto', which chooses what fits; "
            "CUDA_VISIBLE_DEVICES=0 shows one of several GPUs alone."
        )
    if implementation != "auto":
        return implementation
    if fits and dtype in KERNEL_DTYPES:
        return "kernels"
    return "fused" if platform in FUSED_PLATFORMS else "plain"
