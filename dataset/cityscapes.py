"""Cityscapes (Cordts et al., CVPR 2016): 19 classes, 2048×1024 images, splits train, val and test."""

from pathlib import Path

from dataset.files import Pair, Source
from dataset.labels import DataError, LabelTable

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

TABLE = LabelTable(
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


def find_pairs(root: Path, split: str) -> list[Pair]:
    """All images of a split with their labels; the images of the test split have none."""
    pairs = []
    for folder in SPLITS[split]:
        images = sorted((root / "leftImg8bit" / folder).glob("*/*_leftImg8bit.png"))
        if not images:
            raise DataError(f"{root / 'leftImg8bit' / folder}: no */*_leftImg8bit.png found there")
        for image in images:
            name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
            label = root / "gtFine" / folder / image.parent.name / name
            pairs.append(Pair(image, None if split == "test" else label))
    return pairs


CITYSCAPES = Source(
    name="cityscapes",
    prefix="CS_scenes",
    table=TABLE,
    splits=tuple(SPLITS),
    foreign_labels=("_labelTrainIds.png", "_instanceIds.png", "_color.png"),
    layout="leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png",
    matches=lambda root: (root / "leftImg8bit").is_dir(),
    find_pairs=find_pairs,
)
