"""The class table and the training settings that a checkpoint stores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dataset import DATASETS, LabelTable, generic_table
from evaluation.inference import Fit
from networks import mmsegmentation
from utils.checkpoint import CheckpointError

CITYSCAPES = DATASETS["cityscapes"].labels


class TrainedOn(NamedTuple):
    """What a network saw in training; the defaults are those of a file that does not tell."""

    crop: tuple[int, int] = (769, 769)  # (height, width), the tile of the sliding window: the published one
    clip: int = 1  # frames
    fit: Fit = None  # how evaluation scales images
    ignore_label: int = 255
    step: int | None = None


def trained_on(contents: Mapping[str, Any], path: Path) -> TrainedOn:
    """What a checkpoint's recipe says, or the flat settings of those from before there were recipes.

    Raises:
        CheckpointError: its settings are damaged.
    """
    settings = contents.get("recipe", contents.get("settings", {}))
    network, step, default = contents.get("network", settings), contents.get("step"), TrainedOn()
    damaged = not isinstance(settings, Mapping) or ("recipe" in contents and not isinstance(network, Mapping))
    is_ours = "model" in contents  # other programs have other things under these names
    if damaged and is_ours:
        kinds = f"{type(settings).__name__}, network {type(network).__name__}"
        raise CheckpointError(f"{path}: its settings are damaged (they are not named values, but {kinds})")
    if not isinstance(settings, Mapping):
        return default
    try:
        height, width = settings.get("input_size", default.crop)
        crop, clip = (int(height), int(width)), int(settings.get("clip", default.clip))
        short_side = int(settings.get("eval_short_side", 0))
        ignore_label = int(settings.get("ignore_label", default.ignore_label))
        if min(*crop, clip) < 1 or short_side < 0 or not 0 <= ignore_label <= 255:
            raise ValueError(f"input_size {crop}, clip {clip}, ignore_label {ignore_label}")
    except (TypeError, ValueError) as error:
        if not is_ours:
            return default
        raise CheckpointError(f"{path}: its settings are damaged ({error})") from None
    return TrainedOn(
        crop=crop,
        clip=clip,
        # As Recipe.fit, for checkpoints whose recipe cannot be built.
        fit=short_side or (crop if settings.get("random_affine") else None),
        ignore_label=ignore_label,
        step=step if isinstance(step, int) else None,
    )


def labels_of(
    contents: Mapping[str, Any], path: Path, classes: int, num_classes: int | None = None
) -> LabelTable:
    """The classes that a checkpoint names.

    Checkpoints of train.py and mmsegmentation hold names and colours; older ones of ours name their data set;
    a plain state dict of 19 classes is taken for Cityscapes.

    Args:
        classes: the network's.
        num_classes: given for a checkpoint without names, which then get numbers.

    Raises:
        CheckpointError: no names, or a table that does not fit the network.
    """
    try:
        table = _table_in(contents, classes)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its table of classes is damaged ({error})") from None
    if table is None and num_classes is None and classes == CITYSCAPES.num_classes:
        table = CITYSCAPES
    found = classes if table is None else table.num_classes
    if num_classes not in (None, classes):
        raise CheckpointError(f"{path}: has {classes} classes, not the {num_classes} of --num-classes")
    if table is None and num_classes is None:
        raise CheckpointError(
            f"{path}: holds no class names; --num-classes {classes} (num_classes={classes}) uses numbers"
        )
    if found != classes:
        raise CheckpointError(f"{path}: names {found} classes, but its network has {classes}")
    return table or generic_table(classes)


def _table_in(contents: Mapping[str, Any], classes: int) -> LabelTable | None:
    """The table of a checkpoint of ours, old or new, or of mmsegmentation; None: there is none."""
    data, settings = contents.get("data"), contents.get("settings")
    if not (isinstance(data, Mapping) and "names" in data):
        if named := mmsegmentation.class_names(contents):
            data = {"names": named[0], "palette": named[1] or generic_table(len(named[0])).palette}
        elif isinstance(settings, Mapping) and settings.get("dataset") in DATASETS:
            return DATASETS[settings["dataset"]].labels
        elif isinstance(settings, Mapping) and settings.get("dataset") == "list":
            return generic_table(classes, settings.get("ignore_label", 255))
        else:
            return None
    names = tuple(str(name) for name in data["names"])
    palette = tuple((int(red), int(green), int(blue)) for red, green, blue in data["palette"])
    pairs = tuple((int(left), int(right)) for left, right in data.get("mirror_pairs", ()))
    ids = tuple(int(value) for value in data.get("ids", range(len(names))))
    return LabelTable(names, ids, palette, mirror_pairs=pairs)
