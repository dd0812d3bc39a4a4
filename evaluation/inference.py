"""From images of any size to logits at their size: whole, in sliding windows, at several scales, flipped.

Clips (B,3,T,H,W) are predicted like images: the result is that of one of their frames.
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import LONGEST_SIDE, short_side_size

# Images (B,3,H,W), or clips (B,3,T,H,W) and the index of one of their frames → logits (B,N,H,W) in fp32.
Predict = Callable[..., Tensor]
# What images are scaled to before they are predicted, their proportions kept: (height, width) into which they
# are fitted, or their short side (the long one is at most LONGEST_SIDE); None: they keep their size.
Fit = tuple[int, int] | int | None

NARROW = 16  # pixels; the backbone's strided convolutions see down to an eighth of it


def whole(model: nn.Module) -> Predict:
    """The whole image through the network at once; logits up-sampled bilinearly.

    Corners are aligned, unless the network has an attribute ``align_corners`` that says otherwise.
    """
    aligned = getattr(model, "align_corners", True)

    def predict(images: Tensor, frame: int = 0) -> Tensor:
        return resize(_logits(model, images, frame), images.shape[-2:], aligned)

    return predict


def sliding(model: nn.Module, tile_size: tuple[int, int], tile_batch: int = 4) -> Predict:
    """Tiles of one size that overlap, logits averaged where they do (the reference's test protocol).

    Args:
        model: the network in evaluation mode.
        tile_size: (height, width); a smaller image is padded with 0, the mean colour, right and below.
        tile_batch: tiles that go through the network together.
    """
    aligned = getattr(model, "align_corners", True)

    def predict(images: Tensor, frame: int = 0) -> Tensor:
        batch, (height, width) = len(images), images.shape[-2:]
        below, right = max(tile_size[0] - height, 0), max(tile_size[1] - width, 0)
        padded = F.pad(images, (0, right, 0, below))
        corners = [
            (index, top, left)
            for index in range(batch)
            for top in tile_starts(height + below, tile_size[0])
            for left in tile_starts(width + right, tile_size[1])
        ]
        total: Tensor | None = None
        times = images.new_zeros(batch, 1, *padded.shape[-2:])
        for start in range(0, len(corners), tile_batch):
            group = corners[start : start + tile_batch]
            tiles = torch.stack([_window(padded[i], top, left, tile_size) for i, top, left in group])
            logits = resize(_logits(model, tiles, frame), tile_size, aligned)
            if total is None:
                total = logits.new_zeros(batch, logits.shape[1], *padded.shape[-2:])
            for tile, (i, top, left) in zip(logits, group, strict=True):
                _window(total[i], top, left, tile_size).add_(tile)
                _window(times[i], top, left, tile_size).add_(1)
        assert total is not None
        return total.div_(times)[:, :, :height, :width]

    return predict


def multi_scale(
    predict: Predict,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    mirror_pairs: Sequence[tuple[int, int]] = (),
    fit: Fit = None,
) -> Predict:
    """The mean logits over scaled and, with ``flip``, also mirrored images.

    Two maps of logits are held at a time: the sum, and the prediction that is added to it.

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

    def predict_all(images: Tensor, frame: int = 0) -> Tensor:
        size = images.shape[-2:]
        views = [
            (scaled, mirrored) for scaled in sizes(size) for mirrored in ((False, True) if flip else (False,))
        ]
        assert views, "no sizes"
        which = (frame,) if images.dim() == 5 else ()
        total: Tensor | None = None
        for scaled, mirrored in views:
            view = resize(images, scaled)
            logits = predict(view.flip(-1) if mirrored else view, *which)
            if total is None and not mirrored:
                total = resize(logits, size)
                if total is logits and len(views) > 1:
                    total = logits.clone()  # it is added to in place
            else:
                assert total is not None
                _add(total, logits, mirrored, mirror_pairs)
            del logits
        assert total is not None
        return total if len(views) == 1 else total.div_(len(views))

    return predict_all


def _add(total: Tensor, logits: Tensor, mirrored: bool, mirror_pairs: Sequence[tuple[int, int]]) -> None:
    """Add logits of another size to the sum, a few classes at a time: no further map is held."""
    order = list(range(total.shape[1]))
    if mirrored:
        for left, right in mirror_pairs:
            order[left], order[right] = order[right], order[left]
    step = max(len(order) // 8, 1)
    for start in range(0, len(order), step):
        part = logits[:, order[start : start + step]]
        part = resize(part.flip(3) if mirrored else part, total.shape[2:])
        total[:, start : start + step].add_(part)


def with_autocast(predict: Predict, amp: str, device: torch.device) -> Predict:
    """Compute in a half type; logits stay fp32, as does all on a CPU for very narrow images.

    Args:
        amp: "bf16", "fp16", "off", or "auto": bf16 where the device has instructions for it.
    """
    if amp == "auto":
        amp = "bf16" if _is_fast_in_bf16(device) else "off"
    if amp == "off":
        return predict
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def predict_in_half(images: Tensor, *frame: int) -> Tensor:
        # oneDNN's AMX kernels return uninitialised memory for strided convolutions of maps 1 or 2 wide.
        if device.type == "cpu" and images.shape[-1] <= NARROW:
            return predict(images, *frame)
        with torch.autocast(device.type, dtype=dtype):
            return predict(images, *frame)

    return predict_in_half


def _is_fast_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tile_starts(length: int, tile: int, overlap: float = 1 / 3) -> list[int]:
    """Where tiles begin along one side: every ceil(tile · (1 - overlap)), the last one flush with the end."""
    stride = ceil(tile * (1 - overlap))
    count = ceil((length - tile) / stride) + 1
    return [min(index * stride, length - tile) for index in range(count)]


def _window(x: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    return x[..., top : top + size[0], left : left + size[1]]


def _logits(model: nn.Module, images: Tensor, frame: int) -> Tensor:
    """Logits (B,N,h,w) in fp32 of images, or of one frame of clips."""
    if images.dim() == 4:
        return model(images.contiguous(memory_format=torch.channels_last))["out"].float()
    logits = model(images.contiguous(memory_format=torch.channels_last_3d))["out"]
    return logits[frame :: images.shape[2]].float()  # the network folds frames into the batch


def resize(x: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Images (B,C,H,W) or clips (B,C,T,H,W), bilinearly."""
    if x.shape[-2:] == tuple(size):
        return x
    if x.dim() == 5:
        return resize(x.flatten(0, 1), size, align_corners).unflatten(0, x.shape[:2])
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
