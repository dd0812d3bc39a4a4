"""A tiny synthetic COCO: discs, squares and triangles of random sizes and colours, with their polygons.

python -m instances.demo FOLDER draws it, where no real images are at hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.arguments import run_script

CATEGORIES = {1: "disc", 2: "square", 4: "triangle"}  # ids with a gap, as COCO's
CORNERS = {1: 24, 2: 4, 4: 3}


def draw_shape(rng: np.random.Generator, category: int, height: int, width: int) -> np.ndarray:
    """The corners (N,2) of a shape that lies within the image, in pixels, x first."""
    corners = CORNERS[category]
    radius = rng.uniform(0.08, 0.25) * min(height, width)
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
    centre = rng.uniform(radius, np.array([width, height]) - 1 - radius)
    return np.round(centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def draw_scene(
    rng: np.random.Generator, height: int, width: int, shapes: int
) -> tuple[np.ndarray, list[Any]]:
    """An image (H,W,3) uint8 and its shapes, none of which covers another: (category, corners (N,2))."""
    image = np.full((height, width, 3), rng.integers(60, 180, 3), np.uint8)
    image += rng.integers(0, 40, (height, width, 1), np.uint8)
    taken = np.zeros((height, width), np.uint8)
    placed: list[Any] = []
    for _ in range(20 * shapes):
        if len(placed) == shapes:
            break
        category = int(rng.choice(list(CATEGORIES)))
        corners = draw_shape(rng, category, height, width)
        mask = np.zeros_like(taken)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
        if (mask & taken).any():
            continue
        taken[cv2.dilate(mask, np.ones((5, 5), np.uint8)) > 0] = 1
        colour = rng.integers(0, 256, 3)
        colour[rng.integers(3)] = 255 * rng.integers(2)
        image[mask > 0] = colour
        placed.append((category, corners))
    return image, placed


def write_split(root: Path, split: str, count: int, height: int, width: int, seed: int) -> None:
    """``annotations/instances_<split>.json`` and ``<split>/*.png``; the last of several images is empty."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        upright = index % 4 == 3
        size = (width, height) if upright else (height, width)
        shapes = 0 if 1 < count == index + 1 else int(rng.integers(1, 5))
        image, placed = draw_scene(rng, *size, shapes)
        name = f"{index + 1:06d}.png"
        cv2.imwrite(str(root / split / name), image)
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        for category, corners in placed:
            left, top = corners.min(axis=0)
            box_width, box_height = corners.max(axis=0) - [left, top]
            area = cv2.contourArea(corners.astype(np.float32))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": index + 1, "category_id": category, "iscrowd": 0,
                    "area": float(area), "bbox": [float(x) for x in (left, top, box_width, box_height)],
                    "segmentation": [corners.flatten().tolist()],
                }
            )  # fmt: skip
    categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()]
    contents = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("instances.demo", description="Draw a tiny synthetic COCO.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=48, help="images in train2017 (default: 48)")
    parser.add_argument("--val", type=int, default=12, help="images in val2017 (default: 12)")
    parser.add_argument("--size", type=int, nargs=2, default=(144, 192), metavar=("H", "W"))
    args = parser.parse_args(argv)
    if min(args.size) < 32 or min(args.train, args.val) < 1:
        parser.error("--size must be at least 32 32, --train and --val at least 1")
    for seed, (split, count) in enumerate((("train2017", args.train), ("val2017", args.val))):
        height, width = args.size
        write_split(args.folder, split, count, height, width, seed)
    print(f"{args.folder}: {args.train} + {args.val} images of {len(CATEGORIES)} categories")


if __name__ == "__main__":
    run_script(main, "instances.demo")
