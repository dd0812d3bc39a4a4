"""CamVid (Brostow et al., 2008): 11 classes, 480×360 frames of SegNet's split, 367 / 101 / 233."""

from pathlib import Path

from dataset.files import Pair, Source, read_list
from dataset.labels import DataError, LabelTable

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

TABLE = LabelTable(
    names=tuple(CLASSES), ids=tuple(range(11)), palette=tuple(CLASSES.values()), ignored_ids=(11, 255)
)

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val",),
    "trainval": ("train", "val"),
    "test": ("test",),
}


def find_pairs(root: Path, split: str) -> list[Pair]:
    """All pairs of a split: those of ``<split>.txt`` or, without it, those found in the folders."""
    pairs: list[Pair] = []
    for folder in SPLITS[split]:
        list_file = root / f"{folder}.txt"
        if list_file.is_file() and "/SegNet/" not in list_file.read_text(encoding="utf-8", errors="replace"):
            pairs += read_list(list_file, root)
            continue
        # SegNet's own lists name files of its authors' machine (/SegNet/CamVid/…); the folders tell as much.
        images = sorted(path for path in (root / folder).glob("*") if path.suffix in (".png", ".jpg"))
        if not images:
            raise DataError(f"{root / folder}: no images (*.png, *.jpg) found there")
        pairs += [Pair(image, root / f"{folder}annot" / f"{image.stem}.png") for image in images]
    return pairs


CAMVID = Source(
    name="camvid",
    prefix="CamVid",
    table=TABLE,
    splits=tuple(SPLITS),
    foreign_labels=(),
    layout="<split>/*.png or *.jpg and <split>annot/*.png",
    matches=lambda root: (root / "trainannot").is_dir() or (root / "testannot").is_dir(),
    find_pairs=find_pairs,
)
