"""From a decoded sample to what the network eats, as in the reference's training."""

from dataclasses import dataclass

import cv2
import numpy as np

# Worker processes share the cores among themselves already.
cv2.setNumThreads(0)

# ImageNet's mean in BGR, 0..255; there is no division by a standard deviation.
MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), np.float32)


def normalize(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 BGR → (3,H,W) float32 with the mean taken off."""
    return np.ascontiguousarray((image.astype(np.float32) - MEAN_BGR).transpose(2, 0, 1))


def denormalize(image: np.ndarray) -> np.ndarray:
    """(3,H,W) float32 as the network sees it → (H,W,3) uint8 RGB, to be looked at."""
    return np.clip(np.rint(image.transpose(1, 2, 0) + MEAN_BGR), 0, 255).astype(np.uint8)[:, :, ::-1]


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, random crop, random mirror.

    Args:
        crop_size: (height, width) of the result in pixels; smaller images are padded on the right and at
            the bottom, with 0 (the mean colour) in the image and ``ignore_label`` in the label.
        scale: draw a factor from 0.7, 0.8 … 2.1 (the reference's code; the paper says 0.75 … 2.0).
        mirror: flip left and right with probability 0.5.
    """

    crop_size: tuple[int, int]
    scale: bool = True
    mirror: bool = True
    ignore_label: int = 255

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image (H,W,3) uint8 BGR, train ids (H,W) uint8 → (3,h,w) float32 without mean, (h,w) uint8."""
        if self.scale:
            factor = 0.7 + rng.integers(0, 15) / 10.0
            image = cv2.resize(np.ascontiguousarray(image), None, fx=factor, fy=factor)  # bilinear
            label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        crop_height, crop_width = self.crop_size
        # An image smaller than the crop is taken whole, from its corner (0,0), and padded below.
        top = rng.integers(0, max(image.shape[0] - crop_height, 0) + 1)
        left = rng.integers(0, max(image.shape[1] - crop_width, 0) + 1)
        image = image[top : top + crop_height, left : left + crop_width]
        label = label[top : top + crop_height, left : left + crop_width]

        padding = (0, crop_height - label.shape[0]), (0, crop_width - label.shape[1])
        normalized = np.pad(normalize(image), ((0, 0), *padding))
        label = np.pad(label, padding, constant_values=self.ignore_label)
        if self.mirror and rng.random() < 0.5:
            normalized, label = normalized[:, :, ::-1], label[:, ::-1]
        return np.ascontiguousarray(normalized), np.ascontiguousarray(label)
