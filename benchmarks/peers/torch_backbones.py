"""DenseNet and ResNet-50 in plain PyTorch, the graphs of Keras applications: images [B, 3, H, W] -> features."""

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


BACKBONES = {
    "densenet121": lambda: densenet((6, 12, 24, 16)),
    "densenet201": lambda: densenet((6, 12, 48, 32)),
    "resnet50": lambda: resnet((3, 4, 6, 3)),
}
