"""The dilated ResNet (He et al., CVPR 2016) with the stem of MIT's, torchvision's or mmsegmentation's."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from libs import InPlaceABN, norm_relu
from networks.layers import Norm, conv3x3
from networks.recomputation import checkpointed, recompute_in_backward

STEMS = ("deep", "plain", "v1c")
DEEP_STEMS = {"deep": (64, 128), "v1c": (32, 64)}  # channels of the first two convolutions, of the third


def norm_relu_conv(norm: nn.Module, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(relu(norm(x))). Only norm(x) is saved for it, which an in-place normalisation saves anyway."""
    normalized, rectified = norm_relu(norm, x)
    with recompute_in_backward(rectified, lambda: F.relu(normalized)):
        return conv(rectified)


class Block(nn.Module):
    """relu(last_norm(branch(x)) + shortcut(x)).

    ``norm_pairs`` declares which normalisation follows directly on which convolution, for ``fold_norms``.
    """

    norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """All but the last normalisation, which runs in one pass with the addition and the ReLU."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.last_norm, self.branch(x), self.shortcut(x))[1]


def run_block_pair(first: Block, second: Block, x: Tensor) -> Tensor:
    """second(first(x)), without saving what lies between.

    That is a sum of two tensors that are saved anyway: the first branch's result by its in-place
    normalisation, and x as the first convolution's input.
    """
    if not isinstance(first.last_norm, InPlaceABN):  # then it saves its input, and the sum takes no more
        return second(first(x))
    shortcut = first.shortcut(x)
    branch, between = norm_relu(first.last_norm, first.branch(x), shortcut)
    saved_shortcut = shortcut.detach()
    with recompute_in_backward(between, lambda: F.relu_(branch + saved_shortcut)):
        return second(between)


class Stage(nn.Sequential):
    """Blocks one after another; with ``checkpoint_activations`` only every other one's input is saved."""

    checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        """(B,in_channels,h,w) → (B,out_channels,h/stride,w/stride)."""
        first, *others = cast(Iterable[Block], self)
        x = self._run(first, x)
        for index in range(0, len(others) - 1, 2):
            x = self._run(partial(run_block_pair, others[index], others[index + 1]), x)
        return self._run(others[-1], x) if len(others) % 2 else x

    def _run(self, blocks: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpointed(self, blocks, x)
        return blocks(x)


class BasicBlock(Block):
    """Two 3×3 convolutions and a shortcut (ResNet-18)."""

    norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"), ("conv2", "bn2"))
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
        return norm_relu_conv(self.bn1, self.conv1(x), self.conv2)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(Block):
    """1×1, 3×3, 1×1 and a shortcut (ResNet-50, -101); the stride sits on the 3×3 convolution."""

    norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
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
        x = norm_relu_conv(self.bn1, self.conv1(x), self.conv2)
        return norm_relu_conv(self.bn2, x, self.conv3)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


# name: (block, blocks of each stage)
ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class Backbone(nn.Module):
    """Images (B,3,H,W) → (features for the auxiliary head, features for the head), at 1/8 of the size.

    Attributes:
        channels: of the two.
        mean, std, channel_order: the input's normalisation: (pixel - mean) / std in units of 0..255, channels
            in that order. ``build_model`` sets them to those of the network's config.
    """

    channels: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: str

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class DilatedResNet(Backbone):
    """A ResNet whose last two stages dilate instead of striding, so that features stay at 1/8.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        norm: makes the normalisation layers; their activation is the identity, a ReLU follows.
        stem: "deep", three 3×3 convolutions as in MIT scene parsing's weights; "plain", one 7×7 as in
            torchvision's; "v1c", three narrower ones as in mmsegmentation's.
        contracted_dilation: the first block of a dilated stage has half the dilation.
        checkpoint_activations: recompute activations in the backward pass instead of saving them.

    Attributes:
        planes: of the four stages' blocks.
        channels: of ``layer3`` and ``layer4``.
    """

    planes: ClassVar[tuple[int, int, int, int]] = (64, 128, 256, 512)

    def __init__(
        self,
        architecture: str,
        norm: Norm,
        stem: str = "deep",
        contracted_dilation: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        block, (blocks1, blocks2, blocks3, blocks4) = ARCHITECTURES[architecture]
        self.stem = stem
        if stem in DEEP_STEMS:
            narrow, wide = DEEP_STEMS[stem]
            self.conv1, self.bn1 = conv3x3(3, narrow, stride=2), norm(narrow)
            self.conv2, self.bn2 = conv3x3(narrow, narrow), norm(narrow)
            self.conv3, self.bn3 = conv3x3(narrow, wide), norm(wide)
        else:
            wide = 64
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), norm(64)
        # ceil_mode as in the reference: a 769×769 crop gives 97×97 features either way, other sizes differ.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=stem != "v1c")
        contraction = 2 if contracted_dilation else 1
        planes1, planes2, planes3, planes4 = self.planes
        channels1, channels2, channels3, channels4 = (planes * block.expansion for planes in self.planes)
        self.layer1 = _stage(block, wide, planes1, blocks1, norm)
        self.layer2 = _stage(block, channels1, planes2, blocks2, norm, stride=2)
        self.layer3 = _stage(
            block, channels2, planes3, blocks3, norm, dilation=2, first_dilation=2 // contraction
        )
        self.layer4 = _stage(
            block, channels3, planes4, blocks4, norm, dilation=4, first_dilation=4 // contraction
        )
        self.channels = (channels3, channels4)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            stage.checkpoint_activations = checkpoint_activations

    @property
    def norm_pairs(self) -> tuple[tuple[str, str], ...]:
        """As in ``Block``, of the stem."""
        return tuple((f"conv{i}", f"bn{i}") for i in ((1, 2, 3) if self.stem in DEEP_STEMS else (1,)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) → outputs of layer3 and layer4, each (B, channels, ~H/8, ~W/8)."""
        x, last_norm = self.conv1(images), self.bn1
        if self.stem in DEEP_STEMS:
            x = norm_relu_conv(self.bn1, x, self.conv2)
            x = norm_relu_conv(self.bn2, x, self.conv3)
            last_norm = self.bn3
        # Equals maxpool(relu(x)), with the ReLU on a quarter of the positions.
        x = F.relu_(self.maxpool(last_norm(x)))
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
    first_dilation: int = 1,
) -> Stage:
    """One stage: the first block adapts size and channels, and may dilate less; the others are alike."""
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels)
        )
    layers = [block(in_channels, planes, norm, stride, first_dilation, downsample)]
    layers += [block(out_channels, planes, norm, dilation=dilation) for _ in range(1, blocks)]
    return Stage(*layers)


# name: makes a Backbone from (norm, stem=…, contracted_dilation=…, checkpoint_activations=…)
BACKBONES: dict[str, Callable[..., Backbone]] = {name: partial(DilatedResNet, name) for name in ARCHITECTURES}
