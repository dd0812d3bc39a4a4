"""CamVid (Brostow et al., 2008): 11 classes, 480×360 frames of SegNet's split, 367 / 101 / 233."""

import re
from pathlib import Path

from dataset.labels import LabelTable
from dataset.source import DatasetSpec, Pair, find_images, pair_images, read_list

CLASSES: dict[str, tuple[int, int, int]] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign-symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}

LABELS = LabelTable(
    names=tuple(CLASSES), ids=tuple(range(11)), palette=tuple(CLASSES.values()), ignored_ids=(11, 255)
)

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val",),
    "trainval": ("train", "val"),
    "test": ("test",),
}


def list_samples(root: Path, split: str) -> list[Pair]:
    """All pairs of a split: those of ``<split>.txt`` or, without it, those found in the folders."""
    pairs: list[Pair] = []
    for folder in SPLITS[split]:
        list_file = root / f"{folder}.txt"
        if list_file.is_file() and "/SegNet/" not in list_file.read_text(encoding="utf-8", errors="replace"):
            pairs += read_list(list_file, root)
            continue
        # SegNet's own lists name files of its authors' machine (/SegNet/CamVid/…); the folders tell as much.
        pairs += pair_images(find_images(root / folder), root / f"{folder}annot")
    return pairs


def frame_of(image: Path) -> tuple[str, int] | None:
    """Sequence and frame number of an image: 0016E5_07959.png → train/0016E5, 7959.

    Each split is a sequence of its own: that of val has another spacing of frames.
    """
    match = re.fullmatch(r"(.+)_f?(\d+)", image.stem)
    return (f"{image.parent.name}/{match[1]}", int(match[2])) if match else None


CAMVID = DatasetSpec(
    name="camvid",
    prefix="CamVid",
    labels=LABELS,
    splits=tuple(SPLITS),
    other_label_suffixes=(),
    layout="<split>/*.png (or .jpg …) and <split>annot/*.png",
    matches=lambda root: (root / "trainannot").is_dir() or (root / "testannot").is_dir(),
    list_samples=list_samples,
    frame_of=frame_of,
)
