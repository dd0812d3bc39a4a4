"""What a data set is: its files, its classes, and how a sample becomes a tensor."""

from dataclasses import replace
from pathlib import Path

from dataset.ade20k import ADE20K
from dataset.camvid import CAMVID
from dataset.cityscapes import CITYSCAPES
from dataset.clips import Clip, evaluation_clips, training_clips
from dataset.labels import DataError, DataUsageError, LabelTable, generic_table
from dataset.lip import LIP
from dataset.loader import (
    Batch,
    EvaluationDataset,
    Sample,
    StepSampler,
    TrainDataset,
    load_batches,
    load_samples,
)
from dataset.options import DataOptions
from dataset.source import DatasetSpec, Pair, fingerprint, list_samples
from dataset.supervision import check_supervision
from dataset.transforms import LONGEST_SIDE, AffineTransform, Normalization, TrainTransform, short_side_size

# The data sets known by name; a module of yours may add its own.
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (CITYSCAPES, CAMVID, ADE20K, LIP)}

__all__ = [
    "DATASETS",
    "LONGEST_SIDE",
    "AffineTransform",
    "Batch",
    "Clip",
    "DataError",
    "DataOptions",
    "DatasetSpec",
    "EvaluationDataset",
    "LabelTable",
    "Normalization",
    "Pair",
    "Sample",
    "StepSampler",
    "TrainDataset",
    "TrainTransform",
    "check_supervision",
    "evaluation_clips",
    "find_dataset",
    "fingerprint",
    "generic_table",
    "list_samples",
    "load_batches",
    "load_samples",
    "short_side_size",
    "training_clips",
]


def find_dataset(
    root: Path, name: str | None = None, num_classes: int | None = None, ignore_label: int = 255
) -> DatasetSpec:
    """The data set in a folder: the named one, or the one whose layout the folder has.

    Args:
        root: the data folder.
        name: a name in ``DATASETS`` or "list" (pairs that a list file names); None guesses from the layout.
        num_classes: needed for "list", whose labels hold train ids; otherwise only checked.
        ignore_label: the train id of pixels that are not trained on. Of a "list" it is also what label
            files store for them; 0 means that they store 0 there, and the classes as 1 .. N.

    Returns:
        The data set; its ``ignore_label`` is what transforms, losses and scores must ignore.

    Raises:
        DataError: no such folder, nothing in it, an unknown layout, or another number of classes.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder")
    if not any(root.iterdir()):
        raise DataError(f"{root}: the data folder is empty")
    if name == "list":
        if num_classes is None:
            raise DataUsageError("--dataset list needs --num-classes")
        return _list_dataset(num_classes, ignore_label)
    if name is None:
        name = _guess(root)
    if name not in DATASETS:
        raise DataUsageError(f"--dataset {name}: known are {', '.join([*DATASETS, 'list'])}")
    spec = DATASETS[name]
    known = spec.labels.num_classes
    if num_classes not in (None, known):
        raise DataError(f"--num-classes {num_classes}: {name} has {known} classes")
    return replace(spec, ignore_label=_train_id_of_ignored(spec.labels, ignore_label, f" of {name}"))


def _train_id_of_ignored(labels: LabelTable, ignore_label: int, of_data_set: str = "") -> int:
    """The train id of ignored pixels: no class may have it."""
    if ignore_label == 0 and 0 in labels.ignored_ids:
        return 255  # label files store 0 for unlabelled pixels, but train id 0 is a class
    if 0 <= ignore_label < labels.num_classes:
        raise DataError(
            f"--ignore-label {ignore_label} is one of the {labels.num_classes} classes{of_data_set}"
        )
    if not 0 <= ignore_label <= 255:
        raise DataError(f"--ignore-label {ignore_label}: label files hold 0 to 255")
    return ignore_label


def _guess(root: Path) -> str:
    matching = [name for name, spec in DATASETS.items() if spec.matches(root)]
    if len(matching) == 1:
        return matching[0]
    layouts = "; ".join(f"{spec.name}: {spec.layout}" for spec in DATASETS.values())
    raise DataError(
        f"{root}: not the layout of one known data set ({layouts}); "
        "for your own data give --dataset list --data-list FILE --num-classes N"
    )


def _list_dataset(num_classes: int, ignore_label: int) -> DatasetSpec:
    if not 1 <= num_classes <= 255:
        raise DataError(f"--num-classes {num_classes}: label files of 8 bits hold 1 to 255 classes")
    labels = generic_table(num_classes, ignore_label if 0 <= ignore_label <= 255 else 255)
    return DatasetSpec(
        name="list",
        prefix="model",
        labels=labels,
        splits=(),
        other_label_suffixes=(),
        layout="any; a list file names the pairs",
        matches=lambda root: False,
        list_samples=lambda root, split: [],
        ignore_label=_train_id_of_ignored(labels, ignore_label),
    )
