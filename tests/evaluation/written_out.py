"""The test protocol with all logits held at full size, written out one image and one tile at a time."""

from math import ceil

import torch
from torch.nn import functional as F


def resized(logits, size, aligned=True):
    return F.interpolate(logits, size, mode="bilinear", align_corners=aligned)


def at_full_size(model, images):
    return resized(model(images)["out"].float(), images.shape[2:], getattr(model, "align_corners", True))


def in_tiles(model, images, tile):
    """The sliding window of the reference's evaluate.py, which cuts tiles before it pads them."""
    (height, width), total = images.shape[2:], None
    rows, columns = (
        max(ceil((n - size) / ceil(size * (1 - 1 / 3))) + 1, 1)
        for n, size in zip((height, width), tile, strict=True)
    )
    times = torch.zeros(height, width)
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * ceil(tile[0] * (1 - 1 / 3)) + tile[0], height)
            right = min(column * ceil(tile[1] * (1 - 1 / 3)) + tile[1], width)
            top, left = max(bottom - tile[0], 0), max(right - tile[1], 0)
            part = images[:, :, top:bottom, left:right]
            padded = F.pad(part, (0, tile[1] - part.shape[3], 0, tile[0] - part.shape[2]))
            logits = at_full_size(model, padded)[:, :, : part.shape[2], : part.shape[3]]
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, top:bottom, left:right] += logits
            times[top:bottom, left:right] += 1
    return total / times


def averaged(predict, images, scales=(1.0,), flip=False, swapped=()):
    """The mean of ``predict`` over views; ``swapped`` are pairs of classes that mirroring swaps."""
    (height, width), views = images.shape[2:], []
    for scale in scales:
        view = resized(images, (max(round(height * scale), 1), max(round(width * scale), 1)))
        views.append(resized(predict(view), (height, width)))
        if flip:
            mirrored = predict(view.flip(3)).flip(3)
            order = list(range(mirrored.shape[1]))
            for left, right in swapped:
                order[left], order[right] = right, left
            views.append(resized(mirrored[:, order], (height, width)))
    return torch.stack(views).mean(0)
