"""Networks for the comparison with zennit, as plain modules.

Made of modules alone, activations included, and in the order in which they run: zennit's rules are
hooks on modules. A residual sum is a module too, so that it can be ours, a plain addition, or
zennit's (`with_joins`). `calibrated` draws weights that keep values at their size from layer to
layer, and gives every batch norm the statistics of random images, and scales and shifts that show
if they are applied wrongly.
"""

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

Join = Callable[[], nn.Module]


class Add(nn.Module):
    """The sum of two branches."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class SumOf(nn.Module):
    """The sum of two branches by a module that sums over the last dimension, as zennit's does."""

    def __init__(self, sum_last: nn.Module) -> None:
        super().__init__()
        self.sum_last = sum_last

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.sum_last(torch.stack((left, right), dim=-1))


def with_joins(model: nn.Module, join: Join) -> nn.Module:
    """A copy of a model, every `Add` replaced."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Add):
                setattr(module, name, join())
    return model.eval()


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, features: int = 20) -> nn.Module:
    """Four linear layers."""
    widths = (features, 48, 40, 32)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def vgg(batch_norm: bool, width: int = 16) -> nn.Module:
    """Pairs of convolutions with max-pools between them, and a head of linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for wider in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers.append(nn.Conv2d(channels, wider, 3, padding=1))
            layers += [nn.BatchNorm2d(wider)] if batch_norm else []
            layers.append(nn.ReLU())
            channels = wider
        layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(channels * 16, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), *head)


def varied() -> nn.Module:
    """Strides, dilation, groups, transposed and one-dimensional convolutions, average pools."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12),
        nn.GELU(),
        nn.Conv2d(12, 18, 3, padding="same", groups=3),
        nn.Softplus(),
        nn.ConvTranspose2d(18, 8, 4, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 9, stride=4, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool1d(5),
        nn.Flatten(),
        nn.Linear(30, 10),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels, width, stride)
        self.join = Add()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu2(self.join(self.shortcut(x), y))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, the stride at the 3x3."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        self.shortcut = _shortcut(channels, out, stride)
        self.join = Add()
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return self.relu3(self.join(self.shortcut(x), y))


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """A residual network of four stages (He et al. 2016)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        width: int = 64,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )
        channels, blocks = width, []
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(block(channels, width << stage, stride))
                channels = block.expansion * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.stem(images)))))


def resnet18(width: int = 16, classes: int = 10) -> nn.Module:
    """The shape of ResNet-18, narrower."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, classes)


def resnet50() -> nn.Module:
    """ResNet-50."""
    return ResNet(Bottleneck, (3, 4, 6, 3))


@torch.no_grad()
def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode, its batch norms as if it had been trained on the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                module.bias.normal_(0.0, 0.1)
    for norm in norms:
        norm.weight.uniform_(0.6, 1.4)
        norm.bias.normal_(0.0, 0.2)
        norm.momentum = 1.0
    if norms:
        model.train()(images)
    for norm in norms:
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.momentum = 0.1
    return model.eval()
