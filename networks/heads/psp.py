"""Pyramid pooling (Zhao et al., Pyramid Scene Parsing Network, CVPR 2017)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.heads.context import ContextHead
from networks.layers import Norm, conv_norm

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Means over 1×1, 2×2, 3×3 and 6×6 bins of the image, each reduced and enlarged, beside the input.

    In training each bin needs more than one value a channel: at least two images for each normalisation.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            conv_norm(nn.Conv2d(channels, channels // len(BINS), 1, bias=False), norm) for _ in BINS
        )
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(bins) for bins in BINS)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) → (B,2C,h,w), for C divisible by 4."""
        parts = [x]
        for pool, branch in zip(self.pools, self.branches, strict=True):
            parts.append(F.interpolate(branch(pool(x)), x.shape[2:], mode="bilinear", align_corners=True))
        return torch.cat(parts, dim=1)


class PSPHead(ContextHead):
    """Pyramid pooling as the context module; arguments as in ``ContextHead``."""

    needs_two_images: ClassVar[bool] = True

    def __init__(self, in_channels: int, num_classes: int, norm: Norm) -> None:
        channels = in_channels // 4
        super().__init__(in_channels, num_classes, norm, PyramidPooling(channels, norm), 2 * channels)
