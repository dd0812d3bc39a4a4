"""Networks in operations that every runtime has, for ``export.py``."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cc_attention import CrissCrossAttention, reference
from networks.config import NetworkConfig


class Logits(nn.Module):
    """Normalised images (B,3,H,W) → logits (B,N,~H/8,~W/8), fp32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)["out"]
        return logits


class Full(Logits):
    """RGB pictures (B,H,W,3) uint8 → predicted train ids (B,H,W) uint8."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, config: NetworkConfig) -> None:
        super().__init__(network)
        self.flip, self.align_corners = config.channel_order == "BGR", config.align_corners
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = ((x.flip(1) if self.flip else x) - self.mean) / self.std
        logits = F.interpolate(
            super().forward(x), images.shape[1:3], mode="bilinear", align_corners=self.align_corners
        )
        return logits.argmax(dim=1).to(torch.uint8)


class Formula(nn.Module):
    """A CrissCrossAttention in operations that every runtime has; the attention is stored whole."""

    def __init__(self, layer: CrissCrossAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        query, key, value = layer.query_conv(x), layer.key_conv(x), layer.value_conv(x)
        return x + layer.gamma * reference.criss_cross_attention(query, key, value)


class BinMeans(nn.Module):
    """AdaptiveAvgPool2d as a product with two matrices that depend on the input's size.

    ONNX has pooling with fixed windows only, so that the traced size's would stay.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.averaging(length, x.device).to(x.dtype) for length in x.shape[2:])
        return rows @ x @ columns.T

    def averaging(self, length: int, device: torch.device) -> Tensor:
        """(bins,length): bin i is the mean of floor(i·length/bins) to before ceil((i+1)·length/bins)."""
        position, index = (torch.arange(count, device=device) for count in (length, self.bins))
        index = index[:, None]
        start = index * length // self.bins
        end = ((index + 1) * length + self.bins - 1) // self.bins
        inside = ((position >= start) & (position < end)).float()
        return inside / inside.sum(dim=1, keepdim=True)


def with_formula(module: Logits) -> Logits:
    """A copy with ``Formula`` in the place of criss-cross attention, and ``BinMeans`` of adaptive pooling.

    It shares the module's parameters.
    """
    shared: dict[int, Any] = {id(x): x for x in (*module.parameters(), *module.buffers())}
    changed = copy.deepcopy(module, shared)
    for parent in list(changed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, CrissCrossAttention):
                setattr(parent, name, Formula(child))
            elif isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
                setattr(parent, name, BinMeans(child.output_size))
    return changed
