"""Criss-cross attention as a layer."""

import torch
from torch import Tensor, nn

from cc_attention.ops import criss_cross_attention


class CrissCrossAttention(nn.Module):
    """x + gamma · attention(query(x), key(x), value(x)) along each position's lines (paper, section 3.2).

    The lines are row and column, and in a clip the line through time as well: the parameters are the same, so
    a checkpoint of an image network loads into one for clips.

    Args:
        in_channels: C of the input, at least 8; queries and keys have C/8 channels.
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
        """(B,C,H,W) → (B,C,H,W), or (B,C,T,H,W) → (B,C,T,H,W)."""
        if x.dim() == 5:
            # The frames below each other are an image, for a 1×1 convolution.
            image, sizes = x.flatten(2, 3), x.shape[2:4]
            convolutions = (self.query_conv, self.key_conv, self.value_conv)
            query, key, value = (convolution(image).unflatten(2, sizes) for convolution in convolutions)
        else:
            query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        out = criss_cross_attention(query, key, value)
        # One operation holds no map for the product, and none in fp32 under autocast.
        return torch.addcmul(x, self.gamma.to(x.dtype), out)
