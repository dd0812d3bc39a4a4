"""Dropout of channels that a sample takes along, wherever and in whatever company it is computed."""

from torch import Tensor, arange, int64, nn


class SampleDropout2d(nn.Dropout2d):
    """nn.Dropout2d; given the keys of its samples, its masks depend on them alone.

    So a run's numbers do not depend on how its batches are split over devices, processes or parts, and need
    no random state. The masks are computed on the device from a hash, which costs next to nothing.

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
        return x * (kept.to(x.dtype) / (1 - self.p))[:, :, None, None]


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
