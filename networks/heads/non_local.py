"""Full attention instead of criss-cross attention (Wang et al., Non-local Neural Networks, CVPR 2018)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.heads.context import ContextHead
from networks.layers import Norm


class NonLocalAttention(nn.Module):
    """x + gamma · attention(query(x), key(x), value(x)) over all positions; the energies are not scaled.

    The layers are those of ``cc_attention.CrissCrossAttention``. The attention (h·w)² is never stored, unless
    ``explicit``: fused kernels compute it once for every group of channels that is as wide as the queries,
    since they want all three inputs of one width.

    Args:
        in_channels: C of the (B,C,h,w) input, at least 8; queries and keys have C/8 channels.
        explicit: store the attention, as published implementations do.
    """

    def __init__(self, in_channels: int, explicit: bool = False) -> None:
        super().__init__()
        if in_channels < 8:
            raise ValueError(f"in_channels must be at least 8; got {in_channels}")
        self.explicit = explicit
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))  # the layer starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) → (B,C,h,w)."""
        convs = (self.query_conv, self.key_conv, self.value_conv)
        # (B,h·w,C/8) twice and (B,h·w,C): no copies if x is channels-last; fused kernels want channels last.
        query, key, value = (conv(x).flatten(2).transpose(1, 2).contiguous() for conv in convs)
        if self.explicit:
            out = torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value
        else:
            width, channels = query.shape[2], value.shape[2]
            groups = channels // width if channels % width == 0 else 1
            query, key = (y[:, None].expand(-1, groups, -1, -1) for y in (query, key))
            value = value.unflatten(2, (groups, -1)).transpose(1, 2)  # (B,groups,h·w,C/groups)
            out = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])
        return torch.addcmul(x, self.gamma.to(x.dtype), out)


class NonLocalHead(ContextHead):
    """One full attention block as the context module; arguments as in ``ContextHead``.

    Args:
        explicit_attention: store the attention, see ``NonLocalAttention``.
        initial_gamma: the factor that the attention is added with, at the start of training.
    """

    options: ClassVar[tuple[str, ...]] = ("explicit_attention", "initial_gamma")

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        norm: Norm,
        explicit_attention: bool = False,
        initial_gamma: float = 0.0,
    ) -> None:
        context = NonLocalAttention(in_channels // 4, explicit_attention)
        nn.init.constant_(context.gamma, initial_gamma)
        super().__init__(in_channels, num_classes, norm, context)
