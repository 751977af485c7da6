"""PyTorch: the same graph, eager, or compiled with channels last; on a GPU if there is one."""

import sys

import torch
import torch.nn.functional as F
from protocol import (
    AMM_WIDTHS,
    CLASS_WEIGHTS,
    DROPOUT,
    HEAD_WIDTH,
    LEARNING_RATE,
    MOMENTUM,
    RUN_STEPS,
    parse_arguments,
    serve,
)
from torch import nn
from torch_backbones import BACKBONES

arguments = parse_arguments(mode=("eager", "compiled"), dtype=("float32", "bfloat16"))
if arguments.backbone not in BACKBONES:
    sys.exit(f"no {arguments.backbone} written for this peer")


class CXA(nn.Module):
    """Backbone, AMM, weighted average and head of Table 3: images [B, 3, H, W] -> logits [B]."""

    def __init__(self, backbone: str):
        super().__init__()
        self.backbone, channels = BACKBONES[backbone]()
        self.norm = nn.BatchNorm2d(channels, 1e-3, 0.01)
        widths = (channels, *AMM_WIDTHS)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.attention = nn.Conv2d(widths[-1], 1, 1)
        self.dense, self.logit = nn.Linear(channels, HEAD_WIDTH), nn.Linear(HEAD_WIDTH, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        features = self.norm(self.backbone(images))
        x = features
        for conv in self.convs:
            x = F.elu(conv(x))
        # 'same' for a 2x2 window of stride 1 pads right and below, and what is padded does not count: the last row
        # and column repeated give that average.
        x = torch.cat([x, x[:, :, -1:]], 2)
        x = torch.cat([x, x[..., -1:]], 3)
        weights = torch.sigmoid(self.attention(F.avg_pool2d(x, 2, 1)))
        pooled = (weights * features).sum((2, 3)) / weights.sum((2, 3))
        x = F.elu(self.dense(F.dropout(pooled, DROPOUT, self.training)))
        return self.logit(F.dropout(x, DROPOUT, self.training))[:, 0]


device = "cuda" if torch.cuda.is_available() else "cpu"
layout = torch.channels_last if arguments.mode == "compiled" else torch.contiguous_format
autocast = torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
network = CXA(arguments.backbone).to(device, memory_format=layout)
forward = torch.compile(network, dynamic=False) if arguments.mode == "compiled" else network
optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=MOMENTUM)
generator = torch.Generator().manual_seed(0)
images = torch.rand(arguments.batch_size, 3, arguments.image_size, arguments.image_size, generator=generator)
images = images.to(device, memory_format=layout)
labels = (torch.arange(arguments.batch_size) % 2).float().to(device)
weights = torch.where(labels > 0, CLASS_WEIGHTS[1], CLASS_WEIGHTS[0])


def step() -> torch.Tensor:
    """Run one step; its loss stays on the device."""
    network.train()
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        logits = forward(images)
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels, weight=weights)
    loss.backward()
    optimizer.step()
    return loss


def train() -> float:
    """Run one step to its loss on the host."""
    return step().item()


def train_run() -> float:
    """Run RUN_STEPS steps in a row, and fetch the last one's loss."""
    for _ in range(RUN_STEPS):
        loss = step()
    return loss.item()


def predict(batch: torch.Tensor):
    """Return the scores on the host."""
    network.eval()
    with torch.inference_mode(), autocast:
        return torch.sigmoid(forward(batch)).float().cpu().numpy()


serve(
    arguments.first,
    {
        "train": train,
        "train_run": train_run,
        "predict": lambda: predict(images),
        "predict_one": lambda: predict(images[:1]),
    },
    {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "num_params": sum(parameter.numel() for parameter in network.parameters()),
    },
)
