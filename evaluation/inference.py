"""From images of any size to logits at their size: whole, in sliding windows, at several scales, flipped.

The network's logits, at an eighth of the size, are enlarged when somebody asks for rows of them, a band at a
time (``evaluation.bands``): full-size logits of all classes are never held.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import ceil, prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import LONGEST_SIDE, short_side_size
from evaluation.bands import Mean, Mirrored, Resized, Rows, Stored, Tiled
from utils.checkpoint import is_finite

# What images are scaled to before they are predicted, their proportions kept: (height, width) into which they
# are fitted, or their short side (the long one is at most LONGEST_SIDE); None: they keep their size.
Fit = tuple[int, int] | int | None

NARROW = 16  # pixels; the backbone's strided convolutions see down to an eighth of it


class PredictionError(RuntimeError):
    """A network that predicts nothing: one line that gives the reason."""

    exit_status = 1


class Predict(Protocol):
    """A way to predict."""

    def __call__(self, images: Tensor, frame: int | None = None) -> Rows:
        """Images (B,3,H,W) → logits (B,N,H,W) in fp32; clips (B,3,T,H,W) → those of a frame.

        With no frame given, clips have those of all frames, (B·T,N,H,W).

        Raises:
            PredictionError: the network's output is not finite.
        """


def whole(model: nn.Module, amp: str = "off") -> Predict:
    """The whole image through the network at once; logits up-sampled bilinearly.

    Corners are aligned, unless the network has an attribute ``align_corners`` that says otherwise.

    Args:
        model: the network in evaluation mode.
        amp: compute in "bf16" or "fp16"; "off"; "auto": bf16 where the device has instructions for it.
    """
    aligned = getattr(model, "align_corners", True)

    def predict(images: Tensor, frame: int | None = None) -> Rows:
        size = images.shape[-2], images.shape[-1]
        return Resized(Stored(_logits(model, images, frame, amp)), size, aligned)

    return predict


def sliding(model: nn.Module, tile_size: tuple[int, int], tile_batch: int = 4, amp: str = "off") -> Predict:
    """Tiles of one size that overlap, logits averaged where they do (the reference's test protocol).

    Args:
        model: the network in evaluation mode. A batch of tiles at a time moves to its device.
        tile_size: (height, width); a smaller image is padded with 0, the mean colour, right and below.
        tile_batch: tiles, or frames of them, that go through the network at once, at least one of each image.
        amp: as for ``whole``.
    """
    aligned = getattr(model, "align_corners", True)
    tile_height, tile_width = tile_size

    def predict(images: Tensor, frame: int | None = None) -> Rows:
        size = images.shape[-2], images.shape[-1]
        height, width = (max(sides) for sides in zip(size, tile_size, strict=True))
        fits = (height, width) == size  # padding by nothing would copy
        padded = images if fits else F.pad(images, (0, width - size[1], 0, height - size[0]))
        corners = [
            (top, left) for top in tile_starts(height, tile_height) for left in tile_starts(width, tile_width)
        ]
        together = max(tile_batch // (len(images) * prod(images.shape[2:-2])), 1)
        tiles: list[tuple[Rows, int, int]] = []
        for start in range(0, len(corners), together):
            group = corners[start : start + together]
            windows = [padded[..., top : top + tile_height, left : left + tile_width] for top, left in group]
            logits = _logits(model, torch.cat(windows), frame, amp)
            for part, (top, left) in zip(logits.chunk(len(group)), group, strict=True):
                tiles.append((Resized(Stored(part), tile_size, aligned), top, left))
        return Tiled(tiles, size)

    return predict


def multi_scale(
    predict: Predict,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    mirror_pairs: Sequence[tuple[int, int]] = (),
    fit: Fit = None,
) -> Predict:
    """The mean logits over scaled and, with ``flip``, also mirrored images.

    Args:
        predict: ``whole`` or ``sliding``.
        scales: factors of the image's size, resized bilinearly with corners aligned.
        flip: predict each scale also left-right mirrored.
        mirror_pairs: classes that mirroring swaps, left arm and right arm for one.
        fit: what an image is scaled to before; the crop in LIP's protocol.
    """
    return average(predict, lambda size: scaled_sizes(size, scales, fit), flip, mirror_pairs)


def describe_fit(fit: tuple[int, int] | int) -> str:
    """In words: "a short side of 180 (the long one at most 1000)" or "473x473 at most"."""
    if isinstance(fit, int):
        return f"a short side of {fit} (the long one at most {LONGEST_SIDE})"
    return f"{fit[0]}x{fit[1]} at most"


def scaled_sizes(size: Sequence[int], scales: Sequence[float], fit: Fit = None) -> list[tuple[int, int]]:
    """The sizes (height, width) that ``multi_scale`` resizes an image to."""
    factor = 1.0
    if isinstance(fit, int):
        size = short_side_size(size[0], size[1], fit)
    elif fit is not None:
        factor = min(fit[0] / size[0], fit[1] / size[1])
    return [
        (max(round(size[0] * factor * scale), 1), max(round(size[1] * factor * scale), 1)) for scale in scales
    ]


def short_sides(
    predict: Predict,
    sides: Sequence[int],
    flip: bool = False,
    mirror_pairs: Sequence[tuple[int, int]] = (),
) -> Predict:
    """As ``multi_scale``, over images whose short side has the given lengths (ADE20K's protocol).

    Args:
        sides: lengths in pixels, see ``dataset.short_side_size``.
    """
    return average(
        predict, lambda size: [short_side_size(size[0], size[1], side) for side in sides], flip, mirror_pairs
    )


def average(
    predict: Predict,
    sizes: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    flip: bool,
    mirror_pairs: Sequence[tuple[int, int]] = (),
) -> Predict:
    """The mean logits over an image resized to several sizes; see ``multi_scale``.

    Args:
        sizes: from the image's (height, width) to those to predict at.
    """

    def predict_all(images: Tensor, frame: int | None = None) -> Rows:
        size = images.shape[-2], images.shape[-1]
        maps: list[Rows] = []
        for scaled in sizes(size):
            view = resize(images, scaled)
            maps.append(Resized(predict(view, frame), size))
            if flip:
                maps.append(Resized(Mirrored(predict(view.flip(-1), frame), mirror_pairs), size))
        assert maps, "no sizes"
        return Mean(maps)

    return predict_all


def tile_starts(length: int, tile: int, overlap: float = 1 / 3) -> list[int]:
    """Where tiles begin along one side: every ceil(tile · (1 - overlap)), the last one flush with the end."""
    stride = ceil(tile * (1 - overlap))
    count = ceil((length - tile) / stride) + 1
    return [min(index * stride, length - tile) for index in range(count)]


def _logits(model: nn.Module, images: Tensor, frame: int | None, amp: str) -> Tensor:
    """The network's own logits (B,N,h,w), or (B·T,N,h,w), in fp32; see ``Predict``."""
    device = next((parameter.device for parameter in model.parameters()), images.device)
    memory_format = torch.channels_last if images.dim() == 4 else torch.channels_last_3d
    images = images.to(device).contiguous(memory_format=memory_format)
    with _autocast(amp, images):
        logits = model(images)["out"]
    if images.dim() == 5 and frame is not None:  # the network folds frames into the batch
        logits = logits.unflatten(0, (-1, images.shape[2]))[:, frame].contiguous()  # without the other frames
    logits = logits.float()
    if not is_finite(logits):
        fp16 = ", or fp16 is too narrow for it (bf16 is not)" if amp == "fp16" else ""
        raise PredictionError(f"the network's output is not finite; its weights are damaged{fp16}")
    return logits


def _autocast(amp: str, images: Tensor) -> AbstractContextManager[Any]:
    """The context in which the network sees the images."""
    device = images.device
    if amp == "auto":
        amp = "bf16" if _is_fast_in_bf16(device) else "off"
    # oneDNN's AMX kernels return uninitialised memory for strided convolutions of maps 1 or 2 wide.
    if amp == "off" or (device.type == "cpu" and images.shape[-1] <= NARROW):
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


def _is_fast_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resize(x: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Images (B,C,H,W) or clips (B,C,T,H,W), bilinearly."""
    if x.shape[-2:] == tuple(size):
        return x
    if x.dim() == 5:
        return resize(x.flatten(0, 1), size, align_corners).unflatten(0, x.shape[:2])
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
