"""From images of any size to logits at their size: whole, in sliding windows, at several scales, flipped."""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Predict = Callable[[Tensor], Tensor]  # images (B,3,H,W) → logits (B,N,H,W)


def whole(model: nn.Module) -> Predict:
    """The whole image through the network at once; logits up-sampled bilinearly, corners aligned."""

    def predict(images: Tensor) -> Tensor:
        return _resize(_logits(model, images), images.shape[2:])

    return predict


def sliding(
    model: nn.Module, tile_size: tuple[int, int], tile_batch: int = 4, overlap: float = 1 / 3
) -> Predict:
    """Tiles of one size that overlap, logits averaged where they do (the reference's test protocol).

    Args:
        model: the network in evaluation mode.
        tile_size: (height, width); a smaller image is padded with 0, the mean colour, right and below.
        tile_batch: tiles that go through the network together.
        overlap: share of a tile that the next one covers again.
    """

    def predict(images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        below, right = max(tile_size[0] - height, 0), max(tile_size[1] - width, 0)
        padded = F.pad(images, (0, right, 0, below))
        corners = [
            (index, top, left)
            for index in range(batch)
            for top in _tile_starts(height + below, tile_size[0], overlap)
            for left in _tile_starts(width + right, tile_size[1], overlap)
        ]
        total: Tensor | None = None
        times = images.new_zeros(batch, 1, *padded.shape[2:])
        for start in range(0, len(corners), tile_batch):
            group = corners[start : start + tile_batch]
            tiles = torch.stack([_window(padded[i], top, left, tile_size) for i, top, left in group])
            logits = _resize(_logits(model, tiles), tile_size)
            if total is None:
                total = logits.new_zeros(batch, logits.shape[1], *padded.shape[2:])
            for tile, (i, top, left) in zip(logits, group, strict=True):
                _window(total[i], top, left, tile_size).add_(tile)
                _window(times[i], top, left, tile_size).add_(1)
        assert total is not None
        return (total / times)[:, :, :height, :width]

    return predict


def multi_scale(predict: Predict, scales: Sequence[float] = (1.0,), flip: bool = False) -> Predict:
    """The mean logits over scaled and, with ``flip``, also mirrored images.

    Args:
        predict: ``whole`` or ``sliding``.
        scales: factors of the image's size, resized bilinearly with corners aligned.
        flip: predict each scale also left-right mirrored.
    """

    def predict_all(images: Tensor) -> Tensor:
        size = images.shape[2:]
        total: Tensor | None = None
        for scale in scales:
            scaled = images
            if scale != 1:
                scaled = _resize(images, [max(round(side * scale), 1) for side in size])
            logits = predict(scaled)
            if flip:
                logits = (logits + predict(scaled.flip(3)).flip(3)) / 2
            logits = _resize(logits, size)
            total = logits if total is None else total + logits
        assert total is not None, "no scales"
        return total / len(scales)

    return predict_all


def _tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along one side: every ceil(tile · (1 - overlap)), the last one flush with the end."""
    stride = ceil(tile * (1 - overlap))
    count = ceil((length - tile) / stride) + 1
    return [min(index * stride, length - tile) for index in range(count)]


def _window(x: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    return x[:, top : top + size[0], left : left + size[1]]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images.contiguous(memory_format=torch.channels_last))["out"].float()


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
