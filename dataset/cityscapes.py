"""Cityscapes (Cordts et al., CVPR 2016): 19 classes, 2048×1024 images, splits train, val and test."""

from pathlib import Path

from dataset.labels import LabelTable
from dataset.source import DatasetSpec, Pair, find_images, pair_images

# Every id of the benchmark by name; the licence plate (-1) cannot be stored in an 8-bit file.
IDS: dict[str, int] = {
    name: index
    for index, name in enumerate(
        [
            "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground",
            "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge",
            "tunnel", "pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
            "person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
        ]
    )
}  # fmt: skip

# The classes that are trained on and scored, in train id order 0 .. 18, with the benchmark's colours.
CLASSES: dict[str, tuple[int, int, int]] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}

LABELS = LabelTable(
    names=tuple(CLASSES),
    ids=tuple(IDS[name] for name in CLASSES),
    palette=tuple(CLASSES.values()),
    ignored_ids=(*(index for name, index in IDS.items() if name not in CLASSES), 255),
)

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val",),
    "trainval": ("train", "val"),
    "test": ("test",),
}


def list_samples(root: Path, split: str) -> list[Pair]:
    """All images of a split with their labels; the images of the test split have none."""
    pairs = []
    for folder in SPLITS[split]:
        images = find_images(root / "leftImg8bit" / folder, "*/*", "_leftImg8bit")
        if folder == "test":
            pairs += [Pair(image, None) for image in images]
        else:
            pairs += pair_images(images, root / "gtFine" / folder, "*/*_gtFine_labelIds.*", _label_name)
    return pairs


def _label_name(image: Path) -> str:
    return f"{image.parent.name}/{image.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds"


CITYSCAPES = DatasetSpec(
    name="cityscapes",
    prefix="CS_scenes",
    labels=LABELS,
    splits=tuple(SPLITS),
    other_label_suffixes=("_labelTrainIds.png", "_instanceIds.png", "_color.png"),
    layout="leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png",
    matches=lambda root: (root / "leftImg8bit").is_dir(),
    list_samples=list_samples,
)
