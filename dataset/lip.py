"""LIP, Look into Person (Gong et al., CVPR 2017): 20 classes of single persons, 30,462 / 10,000 images."""

from pathlib import Path

from dataset.labels import DataError, LabelTable
from dataset.source import DatasetSpec, Pair, find_images, is_file, pair_images, read_lines

# Stored as 0 .. 19, with the colours in which the benchmark shows them.
CLASSES: dict[str, tuple[int, int, int]] = {
    "background": (0, 0, 0),
    "hat": (128, 0, 0),
    "hair": (255, 0, 0),
    "glove": (0, 85, 0),
    "sunglasses": (170, 0, 51),
    "upper-clothes": (255, 85, 0),
    "dress": (0, 0, 85),
    "coat": (0, 119, 221),
    "socks": (85, 85, 0),
    "pants": (0, 85, 85),
    "jumpsuits": (85, 51, 0),
    "scarf": (52, 86, 128),
    "skirt": (0, 128, 0),
    "face": (0, 0, 255),
    "left-arm": (51, 170, 221),
    "right-arm": (0, 255, 255),
    "left-leg": (85, 255, 170),
    "right-leg": (170, 255, 85),
    "left-shoe": (255, 255, 0),
    "right-shoe": (255, 170, 0),
}

LABELS = LabelTable(
    names=tuple(CLASSES),
    ids=tuple(range(20)),
    palette=tuple(CLASSES.values()),
    ignored_ids=(255,),
    mirror_pairs=((14, 15), (16, 17), (18, 19)),
)

SPLITS: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val",), "trainval": ("train", "val")}

# Where the archives are unpacked: side by side, or each in a folder of its name, once or twice.
IMAGE_PARENTS = (".", "TrainVal_images", "TrainVal_images/TrainVal_images")
LABEL_PARENTS = (
    ".",
    "TrainVal_parsing_annotations",
    "TrainVal_parsing_annotations/TrainVal_parsing_annotations",
)


def _find_folder(root: Path, parents: tuple[str, ...], name: str) -> Path:
    return next((root / parent / name for parent in parents if (root / parent / name).is_dir()), root / name)


def list_samples(root: Path, split: str) -> list[Pair]:
    """All pairs of a split: those that ``<split>_id.txt`` names or, without it, all images of the folder."""
    pairs: list[Pair] = []
    for part in SPLITS[split]:
        images = find_images(_find_folder(root, IMAGE_PARENTS, f"{part}_images"))
        found = pair_images(images, _find_folder(root, LABEL_PARENTS, f"{part}_segmentations"))
        by_name = {pair.image.stem: pair for pair in found}
        lists = (root / parent / f"{part}_id.txt" for parent in IMAGE_PARENTS)
        id_file = next((path for path in lists if is_file(path)), None)
        names = by_name if id_file is None else _read_ids(id_file, by_name)
        pairs += [by_name[name] for name in names]
    return pairs


def _read_ids(id_file: Path, pairs: dict[str, Pair]) -> list[str]:
    """The names without ending that a list holds, one a line."""
    folder = next(iter(pairs.values())).image.parent
    names = []
    for number, line in enumerate(read_lines(id_file), start=1):
        name = line if line in pairs else Path(line).stem  # some lists hold the ending as well
        if name in pairs:
            names.append(name)
        elif line:
            raise DataError(f"{id_file}, line {number}: no image {folder / line} nor {line}.jpg")
    if not names:
        raise DataError(f"{id_file}: the list is empty")
    return names


LIP = DatasetSpec(
    name="lip",
    prefix="LIP",
    labels=LABELS,
    splits=tuple(SPLITS),
    other_label_suffixes=(),
    layout="{train,val}_images/*.jpg, {train,val}_segmentations/*.png and {train,val}_id.txt, "
    "or the same in TrainVal_images/ and TrainVal_parsing_annotations/",
    matches=lambda root: any(
        _find_folder(root, LABEL_PARENTS, f"{part}_segmentations").is_dir() for part in ("train", "val")
    ),
    list_samples=list_samples,
)
