"""The operator written with loops, and inputs for it: shared by the tests of this folder."""

import itertools

import torch
from torch import Tensor

IMAGES = [  # B, Cr, C, H, W
    (2, 3, 5, 7, 9),
    (1, 8, 16, 13, 26),  # more columns and rows than are worked on at a time
    (1, 41, 3, 19, 4),  # more reduced channels than channels
    (1, 2, 3, 1, 6),
    (1, 2, 3, 5, 1),
    (3, 1, 1, 1, 1),
]
CLIPS = [  # B, Cr, C, T, H, W
    (2, 3, 5, 4, 3, 5),
    (1, 9, 18, 2, 13, 14),  # more columns and rows than are worked on at a time
    (1, 2, 3, 17, 2, 2),  # more frames than rows and columns
    (1, 2, 3, 5, 1, 4),
    (1, 2, 3, 5, 4, 1),
    (2, 1, 1, 3, 1, 1),
    (2, 2, 3, 1, 3, 4),
]
EMPTY = [
    (0, 2, 3, 4, 5),
    (2, 2, 3, 0, 5),
    (2, 2, 3, 4, 0),
    (1, 2, 0, 4, 5),
    (1, 0, 2, 4, 5),
    (0, 2, 3, 2, 4, 5),
    (1, 2, 3, 0, 4, 5),
    (1, 2, 3, 2, 0, 5),
    (1, 2, 3, 2, 4, 0),
    (1, 0, 2, 2, 4, 5),
]


def channels_last(shape: tuple[int, ...]) -> torch.memory_format:
    return torch.channels_last if len(shape) == 5 else torch.channels_last_3d


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format | None = None,
    scale: float = 1.0,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Query, key and value; channels-last unless said otherwise."""
    batch, reduced, channels, *sizes = shape
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = []
    for c, factor in ((reduced, scale), (reduced, scale), (channels, 1.0)):
        x = torch.randn(batch, c, *sizes, generator=generator, dtype=torch.float64) * factor
        x = x.to(dtype).contiguous(memory_format=memory_format or channels_last(shape))
        tensors.append(x.requires_grad_(requires_grad))
    return tensors


def lines_through(place: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All positions that differ from ``place`` in at most one coordinate, each once."""
    positions = {
        (*place[:axis], i, *place[axis + 1 :]) for axis, size in enumerate(sizes) for i in range(size)
    }
    assert len(positions) == sum(sizes) - len(sizes) + 1
    return sorted(positions)


def by_loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The sentence of the paper, position by position."""
    out = torch.zeros_like(value)
    for b in range(len(value)):
        for place in itertools.product(*map(range, value.shape[2:])):
            path = lines_through(place, value.shape[2:])
            keys, values = (torch.stack([x[(b, slice(None), *i)] for i in path]) for x in (key, value))
            out[(b, slice(None), *place)] = (keys @ query[(b, slice(None), *place)]).softmax(0) @ values
    return out
