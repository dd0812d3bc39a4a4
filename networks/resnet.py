"""The dilated ResNet with a deep stem (He et al., CVPR 2016; MIT scene parsing), output stride 8."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.recomputation import computed_again, segment

Norm = Callable[[int], nn.Module]  # number of channels → normalisation layer


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


def conv_of_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(relu(x)). Only x is held, which an in-place normalisation before it holds anyway."""
    rectified = F.threshold(x, 0.0, 0.0)  # relu; but its gradient needs what comes in, not what goes out
    held = x.detach()
    with computed_again(rectified, lambda: F.relu(held)):
        return conv(rectified)


class Block(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.branch(x) + self.shortcut(x))


def two_blocks(first: Block, second: Block, x: Tensor) -> Tensor:
    """second(first(x)), without holding what lies between.

    That is a sum of two tensors that are held anyway: the first branch's result by its in-place
    normalisation, and x as the first convolution's input.
    """
    branch, shortcut = first.branch(x), first.shortcut(x)
    between = branch + shortcut
    held_branch, held_shortcut = branch.detach(), shortcut.detach()
    with computed_again(between, lambda: F.relu_(held_branch + held_shortcut)):
        between = F.relu_(between)
        return second(between)


class Stage(nn.Sequential):
    """Blocks one after another; with ``checkpoint_activations`` only every other one's input is held."""

    checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        """(B,in_channels,h,w) → (B,out_channels,h/stride,w/stride)."""
        first, *others = self
        x = self._run(first, x)
        for index in range(0, len(others) - 1, 2):
            x = self._run(partial(two_blocks, others[index], others[index + 1]), x)
        return self._run(others[-1], x) if len(others) % 2 else x

    def _run(self, blocks: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return segment(self, blocks, x)
        return blocks(x)


class BasicBlock(Block):
    """Two 3×3 convolutions and a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride, dilation)
        self.bn1 = norm(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = norm(planes)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.bn2(conv_of_relu(self.conv2, out))


class Bottleneck(Block):
    """1×1, 3×3, 1×1 and a shortcut (ResNet-50, -101); the stride sits on the 3×3 convolution."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = conv3x3(planes, planes, stride, dilation)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = self.bn2(conv_of_relu(self.conv2, out))
        return self.bn3(conv_of_relu(self.conv3, out))


# name: (block, blocks of each stage)
ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class DilatedResNet(nn.Module):
    """A ResNet whose last two stages dilate instead of striding, so that features stay at 1/8.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        norm: makes the normalisation layers; their activation is the identity, a ReLU follows.
        checkpoint_activations: compute activations twice instead of holding them.

    Attributes:
        channels: of ``layer3`` and ``layer4``.
    """

    def __init__(self, architecture: str, norm: Norm, checkpoint_activations: bool = False) -> None:
        super().__init__()
        block, (blocks1, blocks2, blocks3, blocks4) = ARCHITECTURES[architecture]
        self.conv1, self.bn1 = conv3x3(3, 64, stride=2), norm(64)
        self.conv2, self.bn2 = conv3x3(64, 64), norm(64)
        self.conv3, self.bn3 = conv3x3(64, 128), norm(128)
        # ceil_mode as in the reference: a 769×769 crop gives 97×97 features either way, other sizes differ.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(block, 128, 64, blocks1, norm)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks2, norm, stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks3, norm, dilation=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks4, norm, dilation=4)
        self.channels = (256 * block.expansion, 512 * block.expansion)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            stage.checkpoint_activations = checkpoint_activations

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) → outputs of layer3 and layer4, each (B, channels, ~H/8, ~W/8)."""
        x = self.bn1(self.conv1(images))
        x = self.bn2(conv_of_relu(self.conv2, x))
        x = self.bn3(conv_of_relu(self.conv3, x))
        x = F.relu_(self.maxpool(x))  # as the other way round, on a quarter of the positions
        x = self.layer2(self.layer1(x))
        layer3 = self.layer3(x)
        return layer3, self.layer4(layer3)


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    planes: int,
    blocks: int,
    norm: Norm,
    stride: int = 1,
    dilation: int = 1,
) -> Stage:
    """One stage: the first block adapts size and channels; all have the same dilation (multi-grid 1,1,1)."""
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels)
        )
    layers = [block(in_channels, planes, norm, stride, dilation, downsample)]
    layers += [block(out_channels, planes, norm, dilation=dilation) for _ in range(1, blocks)]
    return Stage(*layers)
