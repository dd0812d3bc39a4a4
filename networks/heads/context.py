"""The layers that all compared heads have around their context module: reduction, fusion, classifier."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from networks.heads.base import Head
from networks.layers import Norm, conv3x3, conv_norm


class ContextHead(Head):
    """The criss-cross head's layers around another context module, so that only that differs.

    Args:
        in_channels: of the backbone's last stage; the reduction keeps a quarter of them.
        num_classes: channels of the logits.
        norm: makes the normalisation layers, activation included.
        context: maps (B,in_channels/4,h,w) to (B,context_channels,h,w).
        context_channels: of its output; default: of its input.
    """

    state_names: ClassVar[dict[str, str]] = {"classifier": "bottleneck.3"}

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        norm: Norm,
        context: nn.Module,
        context_channels: int | None = None,
    ) -> None:
        super().__init__()
        channels = in_channels // 4
        context_channels = context_channels or channels
        self.conva = conv_norm(conv3x3(in_channels, channels), norm)
        self.context = context
        self.convb = conv_norm(conv3x3(context_channels, channels), norm)
        self.bottleneck = conv_norm(conv3x3(in_channels + channels, channels), norm)
        self.add_classifier(channels, num_classes)
        self.embedded_channels = context_channels

    def encode(self, x: Tensor, frames: int = 1) -> tuple[Tensor, Tensor]:
        """(B,in_channels,h,w) → what the classifier sees, and the context module's output."""
        context = self.context(self.conva(x))
        return self.bottleneck(torch.cat([x, self.convb(context)], dim=1)), context
