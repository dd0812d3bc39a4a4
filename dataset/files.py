"""Reading images, labels and list files, with one clear line for whatever is wrong with them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from dataset.labels import DataError, LabelTable


class Pair(NamedTuple):
    """One sample: its image and, where there is one, its label."""

    image: Path
    label: Path | None


@dataclass(frozen=True)
class Source:
    """What the scripts need to know of a data set."""

    name: str
    prefix: str  # of checkpoint names: <prefix>_<step>.pth
    table: LabelTable
    splits: tuple[str, ...]
    foreign_labels: tuple[str, ...]  # endings of label files that come with the data but hold other values
    layout: str  # one line that tells a user which files are expected
    matches: Callable[[Path], bool]  # does this folder look like the data set?
    find_pairs: Callable[[Path, str], list[Pair]]


def read_image(path: Path) -> np.ndarray:
    """An image file as (H,W,3) uint8 in BGR order."""
    with _decoded(path, "image") as image:
        if image.mode.startswith(("I", "F")):  # conversion would clip them to 0 … 255
            raise DataError(f"{path}: an image has 8 bits a channel, this one is of mode {image.mode}")
        return np.asarray(image.convert("RGB"))[:, :, ::-1]


def read_label(path: Path) -> np.ndarray:
    """A label file as (H,W) uint8: the stored values of a grey or palette image."""
    with _decoded(path, "label") as image:
        # Of a grey PNG with 2 or 4 bits, raw mode "L;2" or "L;4", Pillow multiplies the values.
        packed = any(str(tile[3]).startswith("L;") for tile in image.tile)
        if packed or image.mode not in ("L", "P"):
            raise DataError(f"{path}: a label is an 8-bit grey or palette image, not {image.mode}")
        return np.array(image)


@contextmanager
def _decoded(path: Path, kind: str) -> Iterator[ImageFile.ImageFile]:
    """An open image, whose faults become a DataError.

    Pillow decodes, because OpenCV returns a half-grey picture for a truncated file and says nothing.
    """
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such {kind}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: unreadable or truncated {kind} ({error})") from None


def read_sample(pair: Pair, table: LabelTable, ignore_label: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H,W,3) uint8 BGR and its train ids (H,W) uint8, or None where the sample has no label."""
    image = read_image(pair.image)
    if pair.label is None:
        return image, None
    label = read_label(pair.label)
    if label.shape != image.shape[:2]:
        raise DataError(
            f"{pair.image} is {image.shape[1]}x{image.shape[0]} but its label {pair.label} "
            f"is {label.shape[1]}x{label.shape[0]}"
        )
    try:
        return image, table.encode(label, ignore_label)
    except DataError as error:
        raise DataError(f"{pair.label}: {error}") from None


def read_list(list_file: Path, root: Path) -> list[Pair]:
    """The pairs of a list file: ``image<TAB>label`` or ``image`` alone, relative to ``root``, one a line.

    Blanks separate as well, as long as no path holds one. Empty lines are passed over.
    """
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot read this list file ({error})") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        fields = line.strip().split("\t") if "\t" in line.strip() else line.split()
        if not fields:
            continue
        if len(fields) > 2 or not all(fields):
            raise DataError(f"{list_file}, line {number}: expected 'image label', got {line.strip()!r}")
        for field in fields:
            if not is_file(root / field):
                raise DataError(f"{list_file}, line {number}: no file {root / field}")
        pairs.append(Pair(root / fields[0], root / fields[1] if len(fields) == 2 else None))
    if not pairs:
        raise DataError(f"{list_file}: the list is empty")
    return pairs


def fingerprint(pairs: list[Pair], root: Path) -> str:
    """The number of samples and a hash of their names, by which a resumed run knows its data again."""
    names = "\n".join(os.path.relpath(path, root) for pair in pairs for path in pair if path is not None)
    return f"{len(pairs)} images, {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def is_file(path: Path) -> bool:
    """As ``Path.is_file``, which raises for a name that is too long to exist."""
    try:
        return path.is_file()
    except OSError:
        return False


def require_files(pairs: list[Pair]) -> None:
    """Raise DataError for the first image or label that does not exist."""
    for pair in pairs:
        for path in pair:
            if path is not None and not is_file(path):
                raise DataError(f"{path}: file is missing")
