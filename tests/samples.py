"""Small files that tests write."""

import cv2
import numpy as np


def write_pair(root, name, size=(20, 30), label_size=None, values=3, seed=0):
    """A random image and label of the "list" layout; the line of a list file that names them."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    cv2.imwrite(str(root / "images" / f"{name}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
    cv2.imwrite(str(root / "labels" / f"{name}.png"), rng.integers(0, values, label_size or size, np.uint8))
    return f"images/{name}.png\tlabels/{name}.png\n"
