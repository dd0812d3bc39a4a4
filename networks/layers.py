"""Layers that backbones and heads share: normalisation by name, convolutions, dropout by key."""

from collections.abc import Callable

from torch import Tensor, arange, int64, nn

from libs import ABN, InPlaceABN, InPlaceABNSync

Norm = Callable[[int], nn.Module]  # number of channels → normalisation layer

# name: makes a layer from a number of channels and the keywords activation, activation_param
NORMS: dict[str, Callable[..., nn.Module]] = {"inplace_abn": InPlaceABN, "sync": InPlaceABNSync, "abn": ABN}


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3×3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


def conv_norm(conv: nn.Conv2d, norm: Norm) -> nn.Sequential:
    """A convolution and the normalisation of its output, whose activation is the norm's."""
    return nn.Sequential(conv, *norm_layers(norm, conv.out_channels))


def with_relu(norm: Norm) -> Norm:
    """A normalisation followed by ReLU, which cannot be inverted and so is no part of In-Place ABN."""
    return lambda channels: nn.Sequential(norm(channels), nn.ReLU())


def norm_layers(norm: Norm, channels: int) -> list[nn.Module]:
    """A normalisation's layers: one, or two where its activation is a layer of its own."""
    layer = norm(channels)
    return list(layer) if isinstance(layer, nn.Sequential) else [layer]


class SampleDropout2d(nn.Dropout2d):
    """Channel dropout whose mask depends only on the sample's key, not on device or batch.

    So a run's numbers do not depend on how its batches are split over devices, processes or parts, and need
    no random state. The masks are computed on the device from a hash, which costs next to nothing. Without
    keys it is nn.Dropout2d.

    Args:
        p: probability of a channel to be zeroed.
        stream: layers with different streams draw independent masks from the same keys.
    """

    def __init__(self, p: float, stream: int = 0) -> None:
        super().__init__(p)
        self.stream = stream

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B,C,H,W), optionally int64 keys (B,) in 0 … 2³²-1 → (B,C,H,W)."""
        if keys is None or not self.training:
            return super().forward(x)
        kept = uniform(keys, x.shape[1], self.stream) >= self.p
        return x * (kept.to(x.dtype) / ((1 - self.p) or 1))[:, :, None, None]  # with p = 1 all are 0


def uniform(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """For each key (B,) int64 ``count`` independent numbers in [0, 1): (B,count) fp32."""
    index = arange(count, dtype=int64, device=keys.device) + (stream << 20)
    bits = _mix(_mix(keys)[:, None] ^ index * 0x9E3779B9 & _32_BITS)
    return (bits >> 8).float() / 2**24


_32_BITS = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers in which each bit of the result depends on all (lowbias32)."""
    x = (x ^ x >> 16) * 0x7FEB352D & _32_BITS
    x = (x ^ x >> 15) * 0x846CA68B & _32_BITS
    return x ^ x >> 16
