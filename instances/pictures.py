"""Instances drawn over an image."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np


def instance_colour(index: int) -> tuple[int, int, int]:
    """A colour (RGB, 0..255) unlike those of the instances before: hues a golden ratio apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(image: np.ndarray, masks: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Each mask tinted, with its outline and its caption; the first ones lie on top.

    Args:
        image: (H,W,3) uint8 RGB; left as it is.
        masks: (H,W) uint8 of 0 and 1 each.
        captions: a text for each mask.

    Returns:
        (H,W,3) uint8 RGB.
    """
    drawn = image.copy()
    scale = max(min(image.shape[:2]) / 640, 0.6)
    for index in reversed(range(len(masks))):
        inside = masks[index] > 0
        if not inside.any():
            continue
        colour = np.array(instance_colour(index))
        drawn[inside] = (0.5 * drawn[inside] + 0.5 * colour).astype(np.uint8)
        outlines, _ = cv2.findContours(masks[index], cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, colour.tolist(), 1)
    for index in reversed(range(len(masks))):
        rows, columns = np.nonzero(masks[index])
        if not len(rows):
            continue
        corner = int(columns.min()), int(rows.min()) + round(16 * scale)
        for line, shade in ((3, 0), (1, 255)):  # white text with a black rim
            style = cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, (shade, shade, shade), line, cv2.LINE_AA
            cv2.putText(drawn, captions[index], corner, *style)
    return drawn
