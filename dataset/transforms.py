"""Normalisation and augmentation: a decoded sample becomes a training tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np

# Worker processes share the cores among themselves already.
cv2.setNumThreads(0)


@dataclass(frozen=True)
class Normalization:
    """(image - mean) / std in the channel order that a backbone was trained with.

    Args:
        mean, std: of each channel, in the network's channel order and in units of 0 .. 255. The default is
            that of the reference: ImageNet's mean in BGR, no division.
        channel_order: "BGR" or "RGB".
    """

    mean: tuple[float, float, float] = (104.00698793, 116.66876762, 122.67891434)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: str = "BGR"

    def __post_init__(self) -> None:
        if self.channel_order not in ("BGR", "RGB"):
            raise ValueError(f'channel_order is "BGR" or "RGB", got {self.channel_order!r}')
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")

    @cached_property
    def _mean(self) -> np.ndarray:
        return np.array(self.mean, np.float32)

    @cached_property
    def _std(self) -> np.ndarray | None:
        return None if self.std == (1, 1, 1) else np.array(self.std, np.float32)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image (H,W,3) uint8 RGB → (3,H,W) float32 in the network's channel order, contiguous."""
        channels = (2, 1, 0) if self.channel_order == "BGR" else (0, 1, 2)
        normalized = np.empty((3, *image.shape[:2]), np.float32)
        for plane, channel, mean in zip(normalized, channels, self._mean, strict=True):
            np.subtract(image[:, :, channel], mean, out=plane)
        if self._std is not None:
            normalized /= self._std[:, None, None]
        return normalized

    def to_rgb(self, image: np.ndarray) -> np.ndarray:
        """Network input (3,H,W) float32 → picture (H,W,3) uint8 RGB."""
        picture = image.transpose(1, 2, 0)
        if self._std is not None:
            picture = picture * self._std
        picture = np.clip(np.rint(picture + self._mean), 0, 255).astype(np.uint8)
        return picture[:, :, ::-1] if self.channel_order == "BGR" else picture


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, random crop, random mirror, then normalisation; the same for all frames of a clip.

    Args:
        crop_size: (height, width) of the result in pixels; smaller images are padded on the right and at
            the bottom, with 0 (the mean colour) in the image and ``ignore_label`` in the label.
        scale: draw a factor from 0.7, 0.8 … 2.1 (the reference's code; the paper says 0.75 … 2.0).
        mirror: flip left and right with probability 0.5.
        ignore_label: train id of pixels that are not trained on.
        normalization: applied to the image.
        mirror_pairs: train ids that swap when a sample is mirrored (``LabelTable.mirror_pairs``).
        short_sides: draw the length of the shorter side in pixels from these, whatever ``scale`` is; the
            longer one becomes at most 1000 (ADE20K's 300, 375, 450, 525, 600).
    """

    crop_size: tuple[int, int]
    scale: bool = True
    mirror: bool = True
    ignore_label: int = 255
    normalization: Normalization = Normalization()
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    short_sides: tuple[int, ...] = ()

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image (H,W,3) uint8 RGB, train ids (H,W) uint8 → (3,h,w) float32 normalised, (h,w) uint8.

        Of a clip: (T,H,W,3), (T,H,W) → (3,T,h,w), (T,h,w).
        """
        height, width = label.shape[-2:]
        resize: dict[str, Any] | None = None
        if self.short_sides:
            short_side = self.short_sides[rng.integers(0, len(self.short_sides))]
            height, width = short_side_size(height, width, short_side)
            resize = {"dsize": (width, height)}
        elif self.scale:
            factor = 0.7 + rng.integers(0, 15) / 10.0
            height, width = round(height * factor), round(width * factor)  # as OpenCV rounds
            resize = {"dsize": None, "fx": factor, "fy": factor}
        crop_height, crop_width = self.crop_size
        # An image smaller than the crop is taken whole, from its corner (0,0), and padded below.
        top = rng.integers(0, max(height - crop_height, 0) + 1)
        left = rng.integers(0, max(width - crop_width, 0) + 1)
        mirrored = self.mirror and rng.random() < 0.5

        def transform_frame(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if resize is not None:
                image = cv2.resize(image, **resize)  # bilinear
                label = cv2.resize(label, **resize, interpolation=cv2.INTER_NEAREST)
            image = image[top : top + crop_height, left : left + crop_width]
            label = label[top : top + crop_height, left : left + crop_width]
            padding = (0, crop_height - label.shape[0]), (0, crop_width - label.shape[1])
            normalized = np.pad(self.normalization(image), ((0, 0), *padding))
            label = np.pad(label, padding, constant_values=self.ignore_label)
            return mirror_sample(normalized, label, self.mirror_pairs) if mirrored else (normalized, label)

        return _each_frame(transform_frame, image, label)


@dataclass(frozen=True)
class AffineTransform:
    """The whole image, scaled, rotated and mirrored at random, in a crop of fixed size; for LIP.

    The image is fitted into the crop with its proportions kept, then scaled by a normally distributed factor
    and turned around its middle (CE2P and SCHP: 473×473, ±25 %, σ = 30° with probability 0.6). What the image
    does not cover is 0 (the mean colour), and ``ignore_label`` in the label.

    Args:
        crop_size: (height, width) of the result in pixels.
        scale: σ and limit of the scale's deviation from 1.
        rotation: σ in degrees; limited to 2σ.
        rotation_probability: how often an image is turned at all.
        mirror, ignore_label, normalization, mirror_pairs: as of ``TrainTransform``.
    """

    crop_size: tuple[int, int]
    scale: float = 0.25
    rotation: float = 30.0
    rotation_probability: float = 0.6
    mirror: bool = True
    ignore_label: int = 255
    normalization: Normalization = Normalization()
    mirror_pairs: tuple[tuple[int, int], ...] = ()

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``TrainTransform``."""
        scale = 1 + self.scale * np.clip(rng.standard_normal(), -1, 1)
        turned = rng.random() < self.rotation_probability
        angle = self.rotation * np.clip(rng.standard_normal(), -2, 2) if turned else 0.0
        mirrored = self.mirror and rng.random() < 0.5
        height, width = label.shape[-2:]
        crop_height, crop_width = self.crop_size
        # SCHP scales the part of the image that is shown, so a larger factor makes the person smaller.
        zoom = min(crop_height / height, crop_width / width) / scale
        middle = (width - 1) / 2, (height - 1) / 2
        matrix = cv2.getRotationMatrix2D(middle, angle, zoom)
        matrix[:, 2] += (crop_width - 1) / 2 - middle[0], (crop_height - 1) / 2 - middle[1]

        def transform_frame(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            size = (crop_width, crop_height)
            normalized = np.ascontiguousarray(self.normalization(image).transpose(1, 2, 0))
            normalized = cv2.warpAffine(normalized, matrix, size).transpose(2, 0, 1)
            label = cv2.warpAffine(
                label, matrix, size, flags=cv2.INTER_NEAREST, borderValue=(self.ignore_label,)
            )
            return mirror_sample(normalized, label, self.mirror_pairs) if mirrored else (normalized, label)

        return _each_frame(transform_frame, image, label)


LONGEST_SIDE = 1000  # pixels, in ADE20K's protocol


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the given shorter side, or smaller where the longer would pass LONGEST_SIDE."""
    factor = min(short_side / min(height, width), LONGEST_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def mirror_sample(
    image: np.ndarray, label: np.ndarray, mirror_pairs: tuple[tuple[int, int], ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Image (3,H,W) and train ids (H,W) uint8 flipped left and right, the classes of each pair swapped."""
    # Copies: np.ascontiguousarray would keep the negative stride of a width of 1, which PyTorch refuses.
    image, label = image[:, :, ::-1].copy(), label[:, ::-1].copy()
    if mirror_pairs:
        mirrored_id = np.arange(256, dtype=np.uint8)
        for left, right in mirror_pairs:
            mirrored_id[left], mirrored_id[right] = right, left
        label = np.take(mirrored_id, label)
    return image, label


def _each_frame(
    transform_frame: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    image: np.ndarray,
    label: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous (3,h,w), (h,w) of an image; (3,T,h,w), (T,h,w) of a clip."""
    if image.ndim == 3:
        image, label = transform_frame(image, label)
        return np.ascontiguousarray(image), np.ascontiguousarray(label)
    frames = [transform_frame(*frame) for frame in zip(image, label, strict=True)]
    return np.stack([image for image, _ in frames], axis=1), np.stack([label for _, label in frames])
