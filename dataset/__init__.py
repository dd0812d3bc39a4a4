"""What a data set is: its files, its classes, and how a sample becomes a tensor."""

from pathlib import Path

from dataset.camvid import CAMVID
from dataset.cityscapes import CITYSCAPES
from dataset.files import Pair, Source, fingerprint, read_list, require_files
from dataset.labels import DataError, LabelTable, generic_table
from dataset.loader import EvaluationDataset, StepSampler, TrainDataset, load
from dataset.transforms import TrainTransform, denormalize

SOURCES: dict[str, Source] = {source.name: source for source in (CITYSCAPES, CAMVID)}
DATASETS = (*SOURCES, "list")

__all__ = [
    "DATASETS",
    "DataError",
    "LabelTable",
    "Pair",
    "Source",
    "StepSampler",
    "EvaluationDataset",
    "TrainDataset",
    "TrainTransform",
    "denormalize",
    "find_source",
    "fingerprint",
    "load",
    "pairs_of",
]


def find_source(
    root: Path, name: str | None = None, num_classes: int | None = None, ignore_label: int = 255
) -> Source:
    """The data set in a folder: the named one, or the one whose layout the folder has.

    Args:
        root: the data folder.
        name: one of ``DATASETS``; None guesses from the layout.
        num_classes: needed for "list", whose labels hold train ids; otherwise only checked.
        ignore_label: the value of a "list" label file that is not trained on.

    Raises:
        DataError: no such folder, nothing in it, an unknown layout, or another number of classes.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder")
    if not any(root.iterdir()):
        raise DataError(f"{root}: the data folder is empty")
    if name == "list":
        if num_classes is None:
            raise DataError("--dataset list needs --num-classes")
        if ignore_label < num_classes:
            raise DataError(f"--ignore-label {ignore_label} is one of the {num_classes} classes")
        return _generic_source(num_classes, ignore_label)
    if name is None:
        matching = [source.name for source in SOURCES.values() if source.matches(root)]
        if len(matching) != 1:
            layouts = "; ".join(f"{source.name}: {source.layout}" for source in SOURCES.values())
            raise DataError(
                f"{root}: not the layout of one known data set ({layouts}); "
                "for your own data give --dataset list --data-list FILE --num-classes N"
            )
        name = matching[0]
    source = SOURCES[name]
    known = source.table.num_classes
    if num_classes not in (None, known):
        raise DataError(f"--num-classes {num_classes}: {name} has {known} classes")
    if ignore_label < known:
        raise DataError(f"--ignore-label {ignore_label} is one of the {known} classes of {name}")
    return source


def pairs_of(source: Source, root: Path, split: str, list_file: Path | None = None) -> list[Pair]:
    """The samples of a list file or, without one, of a split of the data set; every file named exists."""
    if list_file is not None:
        pairs = read_list(list_file, root)
        for _, label in pairs:
            if label is not None and label.name.endswith(source.foreign_labels):
                raise DataError(f"{list_file}: {label.name} does not hold the label ids of {source.name}")
        return pairs
    if split not in source.splits:
        raise DataError(
            f"--split {split}: {source.name} has {', '.join(source.splits) or 'no splits of its own'}"
        )
    pairs = source.find_pairs(root, split)
    require_files(pairs)
    return pairs


def _generic_source(num_classes: int, ignore_label: int) -> Source:
    return Source(
        name="list",
        prefix="model",
        table=generic_table(num_classes, ignore_label),
        splits=(),
        foreign_labels=(),
        layout="any; a list file names the pairs",
        matches=lambda root: False,
        find_pairs=lambda root, split: [],
    )
