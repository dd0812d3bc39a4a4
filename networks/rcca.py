"""The recurrent criss-cross attention head (paper, section 3.2)."""

import torch
from torch import Tensor, nn

from cc_attention import CrissCrossAttention
from networks.dropout import SampleDropout2d
from networks.resnet import Norm, conv3x3


class RCCAHead(nn.Module):
    """Reduction, R rounds of criss-cross attention with shared parameters, and the classifier.

    Two rounds let every position reach every other: first along its row and column, then along theirs.

    Args:
        in_channels: of the backbone's last stage; a quarter of them is kept by the reduction.
        num_classes: channels of the logits.
        recurrence: R, the number of rounds; 0 leaves the attention out (its parameters stay as they are).
        norm: makes the normalisation layers, activation included.
    """

    def __init__(self, in_channels: int, num_classes: int, recurrence: int, norm: Norm) -> None:
        super().__init__()
        channels = in_channels // 4
        self.recurrence = recurrence
        self.conva = nn.Sequential(conv3x3(in_channels, channels), norm(channels))
        self.cca = CrissCrossAttention(channels).requires_grad_(recurrence > 0)
        self.convb = nn.Sequential(conv3x3(channels, channels), norm(channels))
        self.bottleneck = nn.Sequential(
            conv3x3(in_channels + channels, channels),
            norm(channels),
            SampleDropout2d(0.1, stream=0),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Features (B,in_channels,h,w), keys of the samples' dropout (B,) → logits (B,num_classes,h,w)."""
        context = self.conva(x)
        for _ in range(self.recurrence):
            context = self.cca(context)
        context = self.convb(context)
        conv, norm, dropout, classify = self.bottleneck
        x = norm(conv(torch.cat([x, context], dim=1)))
        return classify(dropout(x, keys))
