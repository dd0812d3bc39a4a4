"""Atrous spatial pyramid pooling (Chen et al., Rethinking Atrous Convolution, 2017)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from networks.heads.context import ContextHead
from networks.layers import Norm, conv3x3, conv_norm

RATES = (12, 24, 36)  # at output stride 8


class ASPP(nn.Module):
    """A 1×1 convolution, three dilated 3×3 ones and the image's mean, side by side.

    In training the mean needs more than one value a channel: at least two images for each normalisation.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        width = channels // 2
        convs = [nn.Conv2d(channels, width, 1, bias=False)]
        convs += [conv3x3(channels, width, dilation=rate) for rate in RATES]
        self.branches = nn.ModuleList(conv_norm(conv, norm) for conv in convs)
        self.image = conv_norm(nn.Conv2d(channels, width, 1, bias=False), norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) → (B,5·C/2,h,w)."""
        mean = self.image(x.mean((2, 3), keepdim=True))
        return torch.cat([*(branch(x) for branch in self.branches), mean.expand(-1, -1, *x.shape[2:])], dim=1)


class ASPPHead(ContextHead):
    """DeepLabv3's ASPP as the context module; arguments as in ``ContextHead``."""

    needs_two_images: ClassVar[bool] = True

    def __init__(self, in_channels: int, num_classes: int, norm: Norm) -> None:
        channels = in_channels // 4
        context = ASPP(channels, norm)
        super().__init__(in_channels, num_classes, norm, context, (len(RATES) + 2) * (channels // 2))
