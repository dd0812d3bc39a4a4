"""Whether label files can teach or score anything, found out before hours are spent."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.labels import DataError, LabelTable
from dataset.reading import read_label
from dataset.source import Pair

MAX_FILES = 100
MAX_PIXELS = 3 * 10**8  # a second or two of decoding


def check_supervision(
    pairs: Sequence[Pair], labels: LabelTable, ignore_label: int = 255, training: bool = True
) -> list[str]:
    """Looks at an evenly spaced sample of the label files, all of them if no pixel in the sample counts.

    Args:
        pairs: the samples; those without a label are passed over.
        labels: how the label files are encoded.
        ignore_label: train id of ignored pixels, for messages only.
        training: refuse labels of a single class, which can be scored but teach nothing.

    Returns:
        Warnings, one line each: most of what is labelled is ignored, or a single class occurs in the sample.

    Raises:
        DataError: a label file is unreadable or holds a value of no class; the table has one class; no pixel
            of any label counts, or all that count belong to one class.
    """
    paths = [pair.label for pair in pairs if pair.label is not None]
    if not paths:
        return []
    sample = _evenly_spaced(paths)
    if labels.num_classes < 2:
        raise DataError(
            f"one class cannot be trained or scored: every pixel would be {labels.names[0]!r}; "
            f"the labels hold {_values(_count_values(sample))}; "
            "give at least 2 classes, such as background and object"
        )
    counts = _count_values(sample, labels)
    surveyed = len(sample)
    if not counts[list(labels.ids)].any():
        looked_at = set(sample)
        for path in paths:
            if path not in looked_at:
                counts += _count_values([path], labels)
                surveyed += 1
            if counts[list(labels.ids)].any():
                break
        else:
            raise DataError(
                f"no pixel of the {len(paths)} labels counts: they hold {_values(counts)}, "
                f"which is ignored; the classes are stored as {_expected(labels)}"
            )
    return _doubts(counts, labels, ignore_label, surveyed, len(paths), training)


def _doubts(
    counts: np.ndarray, labels: LabelTable, ignore_label: int, surveyed: int, total: int, training: bool
) -> list[str]:
    occurring = [index for index, value in enumerate(labels.ids) if counts[value]]
    looked_at = f"{surveyed} of {total} labels" if surveyed < total else "all labels"
    found = f"they hold {_values(counts)}; expected are {_expected(labels)}"
    if len(occurring) == 1:
        fault = f"only {labels.names[occurring[0]]!r} occurs in {looked_at}: {found}"
        if surveyed == total and training:
            raise DataError(f"{fault}; one class cannot be trained")
        return [fault]
    ignored = counts.copy()
    ignored[list(labels.ids)] = 0
    missing = labels.num_classes - len(occurring)
    pixels = ignored.sum() / counts.sum()
    values = np.count_nonzero(ignored) / np.count_nonzero(counts)
    if missing and max(pixels, values) > 0.5:
        return [
            f"{pixels:.0%} of the pixels of {looked_at} are ignored (as {ignore_label}) and {missing} of "
            f"{labels.num_classes} classes never occur: {found}"
        ]
    return []


def _evenly_spaced(paths: list[Path]) -> list[Path]:
    """At most MAX_FILES of the files, fewer where the first is large."""
    number = min(MAX_FILES, len(paths), max(1, MAX_PIXELS // max(1, read_label(paths[0]).size)))
    return [paths[index] for index in np.linspace(0, len(paths) - 1, number).round().astype(int)]


def _count_values(paths: Sequence[Path], labels: LabelTable | None = None) -> np.ndarray:
    """(256,) int64: pixels of each stored value; with a table, all values must be in it."""
    counts = np.zeros(256, np.int64)
    for path in paths:
        stored = read_label(path)
        in_file = np.zeros(256, np.int64)
        for top in range(0, len(stored), 1024):  # bincount makes 8 bytes of each
            in_file += np.bincount(stored[top : top + 1024].ravel(), minlength=256)
        if labels is not None:
            try:
                labels.encode(np.flatnonzero(in_file).astype(np.uint8))
            except DataError as error:
                raise DataError(f"{path}: {error}; expected are {_expected(labels)}") from None
        counts += in_file
    return counts


def _values(counts: np.ndarray) -> str:
    found = np.flatnonzero(counts).tolist()
    return (
        f"value{'s' if len(found) > 1 else ''} {', '.join(map(str, found[:12]))}{', …' if found[12:] else ''}"
    )


def _expected(labels: LabelTable) -> str:
    named = [f"{value} ({name})" for value, name in zip(labels.ids, labels.names, strict=True)]
    return ", ".join(named[:6]) + (f", … {named[-1]}" if named[6:] else "")
