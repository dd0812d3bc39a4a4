"""Where the samples of a data set lie: its layout and splits, list files, fingerprints."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dataset.labels import DataError, DataUsageError, LabelTable

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".jp2",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """One sample: its image and, where there is one, its label."""

    image: Path
    label: Path | None


@dataclass(frozen=True)
class DatasetSpec:
    """What the scripts need to know of a data set.

    Args:
        name: what ``--dataset`` calls it.
        prefix: of checkpoint names, ``<prefix>_<step>.pth``.
        labels: its classes, their colours, and the values that label files store.
        splits: the splits that ``list_samples`` knows.
        other_label_suffixes: endings of label files that come with the data but hold other values.
        layout: one line that tells a user which files are expected.
        matches: whether a folder looks like this data set.
        list_samples: the pairs of a split (folder, split).
        frame_of: sequence and frame number of an image of a video; None for one whose name tells neither.
        ignore_label: the train id that pixels without a class get when labels are encoded.

    Raises:
        ValueError: two classes of one name, or a prefix that is no file name.
    """

    name: str
    prefix: str
    labels: LabelTable
    splits: tuple[str, ...]
    other_label_suffixes: tuple[str, ...]
    layout: str
    matches: Callable[[Path], bool]
    list_samples: Callable[[Path, str], list[Pair]]
    frame_of: Callable[[Path], tuple[str, int] | None] | None = None
    ignore_label: int = 255

    def __post_init__(self) -> None:
        names = self.labels.names
        if len(set(names)) < len(names):
            raise ValueError(f"each class of {self.name} has a name of its own, got {names}")
        if not self.prefix or "/" in self.prefix:
            raise ValueError(f"checkpoints' names begin with the prefix, which cannot be {self.prefix!r}")


def list_samples(spec: DatasetSpec, root: Path, split: str, list_file: Path | None = None) -> list[Pair]:
    """The samples of a list file or, without one, of a split of the data set.

    Raises:
        DataError: an unknown split, or a file that does not exist.
    """
    if list_file is not None:
        pairs = read_list(list_file, root)
        other_suffixes = tuple(suffix.lower() for suffix in spec.other_label_suffixes)
        for _, label in pairs:
            if label is not None and label.name.lower().endswith(other_suffixes):
                raise DataError(f"{list_file}: {label.name} does not hold the label ids of {spec.name}")
        return pairs
    if spec.name == "list":
        raise DataUsageError("--dataset list needs --data-list")
    if split not in spec.splits:
        raise DataError(
            f"--split {split}: {spec.name} has {', '.join(spec.splits) or 'no splits of its own'}"
        )
    pairs = spec.list_samples(root, split)
    if not pairs:
        raise DataError(f"{root}: no samples of split {split} of {spec.name}; expected {spec.layout}")
    for pair in pairs:
        for path in pair:
            if path is not None and not is_file(path):
                raise DataError(f"{path}: file is missing")
    return pairs


def find_images(folder: Path, pattern: str = "*", stem_suffix: str = "") -> list[Path]:
    """The pictures of a folder in the order of their names, whatever the case of their endings.

    Hidden files (``._name.png`` of macOS, ``.directory``) are passed over. Everything else that is left out
    is named in a warning.

    Args:
        pattern: where to look, as of ``Path.glob``.
        stem_suffix: what the names end in, before the file's ending.

    Raises:
        DataError: there is none.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.glob(pattern)):
        if is_hidden(path, folder):
            continue
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(stem_suffix)
        (images if is_image and is_file(path) else others).append(path)
    if not images:
        wanted = pattern.removesuffix("*") + "*" + stem_suffix
        raise DataError(f"{folder}: no {wanted}.png found there, nor with another usual ending of pictures")
    if others:
        logger.warning(
            "%s: %d of %d files are no pictures of this data set and are left out: %s",
            *(folder, len(others), len(images) + len(others), name_some(others, folder)),
        )
    return images


def pair_images(
    images: list[Path],
    folder: Path,
    pattern: str = "*",
    label_name: Callable[[Path], str] = attrgetter("stem"),
) -> list[Pair]:
    """Images with their labels; PNG is taken where a label has several endings.

    Where there is none, the pair names the missing ``<name>.png``. Labels without an image are left out and
    named in a warning.

    Args:
        folder: where the labels are.
        pattern: of their files, as of ``Path.glob``.
        label_name: gives the path of an image's label below ``folder``, without its ending.

    Raises:
        DataError: two images have the same label.
    """
    labels: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        name, suffix = path.relative_to(folder).with_suffix("").as_posix(), path.suffix.lower()
        is_label = suffix in IMAGE_SUFFIXES and not is_hidden(path, folder)
        if is_label and (suffix == ".png" or name not in labels):
            labels[name] = path
    image_of: dict[str, Path] = {}
    for image in images:
        other = image_of.setdefault(label_name(image), image)
        if other != image:
            raise DataError(f"{other} and {image.name} have the same label; remove one of them")
    others = [path for name, path in labels.items() if name not in image_of]
    if others:
        logger.warning(
            "%s: %d of %d labels have no image and are left out: %s",
            *(folder, len(others), len(labels), name_some(others, folder)),
        )
    return [Pair(image, labels.get(name, folder / f"{name}.png")) for name, image in image_of.items()]


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether the file or a folder on the way to it, from ``folder`` on, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def name_some(paths: list[Path], folder: Path) -> str:
    """The first five paths, as they are below ``folder``, for a message."""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:5]) + ", …" * bool(paths[5:])


def read_list(list_file: Path, root: Path) -> list[Pair]:
    """The pairs of a list file, one a line: ``image<TAB>label`` or ``image`` alone.

    Names are relative to ``root``, also those with a leading slash where there is no such absolute path.
    Blanks separate as well as a tab, as long as only one reading of a line names existing files. Empty
    lines are passed over.

    Args:
        list_file: absolute, or relative to the working folder or else to ``root``.

    Raises:
        DataError: no such list, an empty one, or a line that names no existing file.
    """
    list_file = _find_list(list_file, root)
    pairs = []
    for number, line in enumerate(read_lines(list_file), start=1):
        if not line:
            continue
        try:
            pairs.append(_parse_line(line, root))
        except DataError as error:
            raise DataError(f"{list_file}, line {number}: {error}") from None
    if not pairs:
        raise DataError(f"{list_file}: the list is empty")
    return pairs


def _find_list(list_file: Path, root: Path) -> Path:
    places = [list_file] if list_file.is_absolute() else [list_file, root / list_file]
    for place in places:
        if is_file(place):
            return place
    looked_for = " and ".join(str(place.absolute()) for place in places)
    fault = "it is a folder" if any(place.is_dir() for place in places) else "no such file"
    raise DataError(f"{list_file}: cannot read this list file; {fault} (looked for {looked_for})")


def read_lines(list_file: Path) -> list[str]:
    """The lines of a text file without blanks at their ends."""
    try:
        content = list_file.read_bytes()
    except OSError as error:
        raise DataError(f"{list_file}: cannot read this list file ({error.strerror})") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise DataError(f"{list_file}: cannot read this list file (not plain text in UTF-8; save it as that)")
    # File names are bytes; those that are not UTF-8 become the same surrogates as in Python's own paths.
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    return [line.strip() for line in re.split("\r\n|\n|\r", text)]


def _parse_line(line: str, root: Path) -> Pair:
    """A line without blanks at its ends → the files that it names."""
    if "\t" in line:
        readings = [line.split("\t")]
        if len(readings[0]) != 2 or not all(field.strip() for field in readings[0]):
            raise DataError(f"expected 'image label', got {line!r}")
    else:
        blanks = re.finditer(r"\s+", line)
        readings = [[line], *([line[: blank.start()], line[blank.end() :]] for blank in blanks)]
    found = [
        [path for path in paths if path is not None]
        for paths in ([_find_file(field.strip(), root) for field in fields] for fields in readings)
        if None not in paths
    ]
    if len(found) > 1:
        raise DataError(f"{line!r} can be read in {len(found)} ways; separate image and label by a tab")
    if not found:
        fields = readings[0] if "\t" in line else line.split()
        if len(fields) > 2:
            raise DataError(f"expected 'image label', got {line!r}; or one of these files is missing")
        missing = next(field for field in fields if _find_file(field.strip(), root) is None)
        raise DataError(f"no file {root / missing.strip().lstrip('/')}")
    return Pair(found[0][0], found[0][1] if len(found[0]) == 2 else None)


def _find_file(name: str, root: Path) -> Path | None:
    relative = name.lstrip("/")
    candidates = (root / name, root / relative, root / relative.replace("\\", "/"))  # \\ of Windows' lists
    return next((path for path in candidates if is_file(path)), None)


def fingerprint(pairs: list[Pair], root: Path) -> str:
    """The number of samples and a hash of their names, by which a resumed run recognises its data."""
    names = [os.fsencode(os.path.relpath(path, root)) for pair in pairs for path in pair if path is not None]
    digest = hashlib.sha256(b"\n".join(names)).hexdigest()
    return f"{len(pairs)} images, {digest[:12]}"


def is_file(path: Path) -> bool:
    """As ``Path.is_file``, which raises for a name that is too long to exist."""
    try:
        return path.is_file()
    except OSError:
        return False
