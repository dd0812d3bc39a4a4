"""The recurrent criss-cross attention head (paper, section 3.3)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from cc_attention import CrissCrossAttention
from networks.heads.base import Head
from networks.layers import Norm, conv3x3, conv_norm


class RCCAHead(Head):
    """Reduction, R rounds of criss-cross attention with shared parameters, fusion, classifier.

    Two rounds let every position reach every other: first along its row and column, then along theirs. In a
    clip lines run along time too, and three rounds reach every position of every frame.

    Args:
        in_channels: of the backbone's last stage; the reduction keeps a quarter of them.
        num_classes: channels of the logits.
        norm: makes the normalisation layers, activation included.
        recurrence: R, the number of rounds; 0 leaves the attention out (its parameters stay as they are).
        initial_gamma: the factor that attention is added with, at the start of training. The published code
            has 0, so that attention enters as training goes on; the paper's equation 2 has no factor: 1.
    """

    options: ClassVar[tuple[str, ...]] = ("recurrence", "initial_gamma")
    state_names: ClassVar[dict[str, str]] = {"classifier": "bottleneck.3"}

    def __init__(
        self, in_channels: int, num_classes: int, norm: Norm, recurrence: int = 2, initial_gamma: float = 0.0
    ) -> None:
        super().__init__()
        channels = in_channels // 4
        self.recurrence = recurrence
        self.has_attention = recurrence > 0
        self.conva = conv_norm(conv3x3(in_channels, channels), norm)
        self.cca = CrissCrossAttention(channels).requires_grad_(recurrence > 0)
        nn.init.constant_(self.cca.gamma, initial_gamma)
        self.convb = conv_norm(conv3x3(channels, channels), norm)
        self.bottleneck = conv_norm(conv3x3(in_channels + channels, channels), norm)
        self.add_classifier(channels, num_classes)

    def encode(self, x: Tensor, frames: int = 1) -> tuple[Tensor, Tensor]:
        """(B·frames,in_channels,h,w) → what the classifier sees, and the last round's output."""
        context = self.conva(x)
        if frames > 1:
            context = context.unflatten(0, (-1, frames)).transpose(1, 2)  # (B,C,T,h,w)
        for _ in range(self.recurrence):
            context = self.cca(context)
        if frames > 1:
            context = context.transpose(1, 2).flatten(0, 1)
        return self.bottleneck(torch.cat([x, self.convb(context)], dim=1)), context
