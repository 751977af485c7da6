"""What a network is called: by the paper where it is one of the paper's, else by what it is made of."""

from typing import Any

BACKBONE_NAMES = {
    "densenet121": ("Dense121", "DenseNet121"),
    "densenet201": ("Dense201", "DenseNet201"),
    "resnet50": ("Res50", "ResNet50"),
    "inception_resnet_v2": ("IncepRes2", "InceptionRes2"),
}
WHOLE = {"model.stride": 32, "model.stride_by": "cut"}  # the paper's networks


def name_model(backbone: str, pooling: str, head: str, stride: int, stride_by: str) -> str:
    """Return the paper's name of a model where it has one (Fig. 2b, Table 5), else backbone-pooling-head.

    The paper's networks have stride 32. One of stride 8 is another model: CXA_Dense121/8, or CXA_Dense121/8 dilated.
    """
    short, long = BACKBONE_NAMES.get(backbone, (backbone, backbone))
    cells, _, way = describe_stride(stride, stride_by).partition(" ")
    if (pooling, head) == ("amm", "mlp"):
        name = f"CXA_{short}{cells}"
    else:
        name = f"{long}{cells}-" + ("GAP" if (pooling, head) == ("gap", "linear") else f"{pooling}-{head}")
    return f"{name} {way}".rstrip()


def describe_stride(stride: int, stride_by: str) -> str:
    """Return what a network's name says of its stride: '' of the paper's 32 px, '/8' if cut there, '/8 dilated'."""
    if stride == WHOLE["model.stride"]:
        return ""
    return f"/{stride}" if stride_by == WHOLE["model.stride_by"] else f"/{stride} {stride_by}d"


def name_run(config: dict[str, Any]) -> str:
    """Return `name_model` of a run's flat config; a run older than strides was a whole network."""
    config = WHOLE | config
    return name_model(*(config[f"model.{field}"] for field in ("backbone", "pooling", "head", "stride", "stride_by")))


def name_backbone(config: dict[str, Any]) -> str:
    """Return the backbone of a run's flat config as configs name it, with its stride: densenet121/8."""
    config = WHOLE | config
    return config["model.backbone"] + describe_stride(config["model.stride"], config["model.stride_by"])
