"""DenseNet, ResNet-50 and Inception-ResNet-v2 in plain PyTorch, the graphs of Keras applications.

Each takes images [B, 3, H, W] to features [B, C, h, w].
"""

import torch
from torch import nn

EPSILON = 1.001e-5
MOMENTUM = 0.01  # PyTorch counts from the other side: Keras' 0.99


def norm_relu(channels: int) -> nn.Sequential:
    """Return batch norm and ReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels, EPSILON, MOMENTUM), nn.ReLU(inplace=True))


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1, BN, ReLU, 3x3; returns its input and 32 new channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            norm_relu(channels),
            nn.Conv2d(channels, 128, 1, bias=False),
            norm_relu(128),
            nn.Conv2d(128, 32, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, C + 32, H, W]."""
        return torch.cat([x, self.layers(x)], 1)


def densenet(num_layers: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Return the network and the channels of its features."""
    modules = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm_relu(64), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for i, count in enumerate(num_layers):
        if i:
            modules += [norm_relu(channels), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(count):
            modules.append(DenseLayer(channels))
            channels += 32
    return nn.Sequential(*modules, norm_relu(channels)), channels


class Bottleneck(nn.Module):
    """ResNet v1's block as Keras has it: the stride in the first 1x1, biases everywhere."""

    def __init__(self, channels: int, width: int, stride: int, project: bool):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 1, stride),
            norm_relu(width),
            nn.Conv2d(width, width, 3, padding=1),
            norm_relu(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.BatchNorm2d(4 * width, EPSILON, MOMENTUM),
        )
        self.shortcut = nn.Identity()
        if project:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride), nn.BatchNorm2d(4 * width, EPSILON, MOMENTUM)
            self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, 4 * width, H / stride, W / stride]."""
        return torch.relu(self.shortcut(x) + self.branch(x))


def resnet(num_blocks: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Return the network and the channels of its features."""
    modules = [nn.Conv2d(3, 64, 7, 2, 3), norm_relu(64), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for i, count in enumerate(num_blocks):
        width = 64 * 2**i
        for j in range(count):
            modules.append(Bottleneck(channels, width, stride=2 if i and not j else 1, project=not j))
            channels = 4 * width
    return nn.Sequential(*modules), channels


INCEPTION_EPSILON = 1e-3
# A branch is a row of pools and convolutions; a convolution is its width, kernel size, stride and padding.
AVERAGE, MAXIMUM = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
REDUCE = (3, 2, "valid")
STEM = ((32, *REDUCE), (32, 3, 1, "valid"), (64, 3), MAXIMUM, (80,), (192, 3, 1, "valid"), MAXIMUM)
MIXED_5B = (((96,),), ((48,), (64, 5)), ((64,), (96, 3), (96, 3)), (AVERAGE, (64,)))
MIXED_6A = (((384, *REDUCE),), ((256,), (256, 3), (384, *REDUCE)), (MAXIMUM,))
MIXED_7A = (
    ((256,), (384, *REDUCE)),
    ((256,), (288, *REDUCE)),
    ((256,), (288, 3), (320, *REDUCE)),
    (MAXIMUM,),
)
BLOCK35 = (((32,),), ((32,), (32, 3)), ((32,), (48, 3), (64, 3)))
BLOCK17 = (((192,),), ((128,), (160, (1, 7)), (192, (7, 1))))
BLOCK8 = (((192,),), ((192,), (224, (1, 3)), (256, (3, 1))))


class UnscaledNorm(nn.BatchNorm2d):
    """Batch norm that learns no scale; a buffer of ones in its place keeps cuDNN's kernel, which wants one."""

    def __init__(self, channels: int):
        super().__init__(channels, INCEPTION_EPSILON, MOMENTUM)
        del self.weight
        self.register_buffer("weight", torch.ones(channels))


def chain(channels: int, steps: tuple) -> tuple[nn.Sequential, int]:
    """Return a branch, with norm and ReLU after each convolution, and the channels it puts out."""
    modules = []
    for step in steps:
        if isinstance(step, nn.Module):
            modules.append(step)
            continue
        width, size, stride, padding = (*step, *(1, 1, "same")[len(step) - 1 :])
        modules.append(nn.Conv2d(channels, width, size, stride, padding, bias=False))
        modules += [UnscaledNorm(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*modules), channels


class Branches(nn.Module):
    """Branches side by side, their outputs concatenated; `channels` counts those of all."""

    def __init__(self, channels: int, branches: tuple):
        super().__init__()
        chains, widths = zip(*(chain(channels, branch) for branch in branches), strict=True)
        self.chains, self.channels = nn.ModuleList(chains), sum(widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, channels, h, w]."""
        return torch.cat([branch(x) for branch in self.chains], 1)


class InceptionBlock(nn.Module):
    """Input plus scaled branches, brought to the input's channels by a 1x1 with bias; then ReLU if asked."""

    def __init__(self, channels: int, branches: tuple, scale: float, relu: bool = True):
        super().__init__()
        self.branches = Branches(channels, branches)
        self.up = nn.Conv2d(self.branches.channels, channels, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, C, H, W], as the input."""
        x = torch.add(x, self.up(self.branches(x)), alpha=self.scale)
        return torch.relu(x) if self.relu else x


def inception_resnet() -> tuple[nn.Module, int]:
    """Return the network and the channels of its features."""
    stem, channels = chain(3, STEM)
    modules = [stem]
    stages = (MIXED_5B, BLOCK35, 0.17, 10), (MIXED_6A, BLOCK17, 0.1, 20), (MIXED_7A, BLOCK8, 0.2, 9)
    for mixed, block, scale, count in stages:
        modules.append(Branches(channels, mixed))
        channels = modules[-1].channels
        modules += [InceptionBlock(channels, block, scale) for _ in range(count)]
    modules.append(InceptionBlock(channels, BLOCK8, 1.0, relu=False))
    last, channels = chain(channels, ((1536,),))
    return nn.Sequential(*modules, last), channels


BACKBONES = {
    "densenet121": lambda: densenet((6, 12, 24, 16)),
    "densenet201": lambda: densenet((6, 12, 48, 32)),
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "inception_resnet_v2": inception_resnet,
}
