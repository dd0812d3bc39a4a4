"""Maps of logits that are computed a band of rows at a time: full-size logits of all classes are never held.

What is held is the network's output, at an eighth of the size, and one band.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

BAND_BYTES = 2**25  # of a band's logits; several such tensors live at a time


class Rows(Protocol):
    """A map of logits (B,N,H,W), of which some rows can be had."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    def rows(self, top: int, bottom: int) -> Tensor:
        """Logits (B,N,bottom-top,W) of the rows from ``top`` to before ``bottom``."""


@dataclass(frozen=True)
class Stored:
    """Logits (B,N,h,w) as they are."""

    logits: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.logits.shape[-2], self.logits.shape[-1]

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.logits[:, :, top:bottom]


@dataclass(frozen=True)
class Resized:
    """A map resized bilinearly, as ``F.interpolate`` does it."""

    source: Rows
    size: tuple[int, int]
    align_corners: bool = True

    def rows(self, top: int, bottom: int) -> Tensor:
        if self.source.size == self.size:
            return self.source.rows(top, bottom)
        height, source_height = self.size[0], self.source.size[0]
        position = torch.arange(top, bottom, dtype=torch.float64)
        if self.align_corners:
            position *= (source_height - 1) / max(height - 1, 1)
        else:  # pixels are squares, of which the centres are compared
            position = ((position + 0.5) * (source_height / height) - 0.5).clamp_(min=0)
        upper = position.floor().long().clamp_(max=source_height - 1)
        lower = (upper + 1).clamp_(max=source_height - 1)
        first = int(upper[0])
        part = self.source.rows(first, int(lower[-1]) + 1)
        weight = (position - upper).to(part.device, part.dtype)[:, None]
        upper, lower = (index.to(part.device) - first for index in (upper, lower))
        part = torch.lerp(part.index_select(2, upper), part.index_select(2, lower), weight)
        if self.source.size[1] == self.size[1]:
            return part
        size = bottom - top, self.size[1]
        return F.interpolate(part, size, mode="bilinear", align_corners=self.align_corners)


@dataclass(frozen=True)
class Tiled:
    """The mean of tiles where they overlap. Tiles may reach beyond the map, which is ignored.

    Args:
        tiles: map, top and left of each; together they cover the whole.
    """

    tiles: Sequence[tuple[Rows, int, int]]
    size: tuple[int, int]

    def rows(self, top: int, bottom: int) -> Tensor:
        total: Tensor | None = None
        width = self.size[1]
        times = torch.zeros(bottom - top, width)
        for tile, tile_top, left in self.tiles:
            first, last = max(top, tile_top), min(bottom, tile_top + tile.size[0])
            if first >= last:
                continue
            part = tile.rows(first - tile_top, last - tile_top)[..., : width - left]
            if total is None:
                total = part.new_zeros(*part.shape[:2], bottom - top, width)
            here = slice(first - top, last - top), slice(left, left + part.shape[-1])
            total[:, :, *here].add_(part)
            times[here].add_(1)
        assert total is not None
        return total.div_(times.to(total.device))


@dataclass(frozen=True)
class Mirrored:
    """What a map of a left-right mirrored image says of the image itself.

    Args:
        mirror_pairs: classes that mirroring swaps.
    """

    source: Rows
    mirror_pairs: Sequence[tuple[int, int]] = ()

    @property
    def size(self) -> tuple[int, int]:
        return self.source.size

    def rows(self, top: int, bottom: int) -> Tensor:
        logits = self.source.rows(top, bottom).flip(-1)
        if not self.mirror_pairs:
            return logits
        order = list(range(logits.shape[1]))
        for left, right in self.mirror_pairs:
            order[left], order[right] = right, left
        return logits[:, order]


@dataclass(frozen=True)
class Mean:
    """The mean of several maps of one size."""

    sources: Sequence[Rows]

    @property
    def size(self) -> tuple[int, int]:
        return self.sources[0].size

    def rows(self, top: int, bottom: int) -> Tensor:
        if len(self.sources) == 1:
            return self.sources[0].rows(top, bottom)
        total = self.sources[0].rows(top, bottom).clone()
        for source in self.sources[1:]:
            total.add_(source.rows(top, bottom))
        return total.div_(len(self.sources))


def class_ids(logits: Rows) -> Tensor:
    """The class of the largest logit, (B,H,W) uint8 on the logits' device."""
    height, width = logits.size
    one = logits.rows(0, 1)
    batch, classes = one.shape[:2]
    band = max(BAND_BYTES // (4 * batch * classes * width), 1)
    ids = torch.empty(batch, height, width, dtype=torch.uint8, device=one.device)
    for top in range(0, height, band):
        bottom = min(top + band, height)
        # As argmax, the first of equal ones, and on a CPU three times as fast or more.
        ids[:, top:bottom] = logits.rows(top, bottom).max(dim=1).indices
    return ids
