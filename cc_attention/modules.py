"""Criss-cross attention as a layer."""

import torch
from torch import Tensor, nn

from cc_attention.ops import criss_cross_attention


class CrissCrossAttention(nn.Module):
    """x + gamma · attention(query(x), key(x), value(x)) over each position's row and column (section 3.1).

    Args:
        in_channels: C of the (B,C,H,W) input, at least 8; queries and keys have C/8 channels.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        if in_channels < 8:
            raise ValueError(f"in_channels must be at least 8; got {in_channels}")
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))  # the layer starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) → (B,C,H,W)."""
        out = criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        return torch.addcmul(
            x, self.gamma.to(x.dtype), out
        )  # no map for the product, none in fp32 under autocast
