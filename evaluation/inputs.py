"""Pictures and videos that a user names, and what their predictions are called."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dataset import DataError
from dataset.source import IMAGE_SUFFIXES, is_hidden, name_some
from evaluation.video import VIDEO_SUFFIXES
from utils.arguments import UsageError

FOLDERS, LEGEND = ("colour", "ids", "overlay", "attention"), "legend.png"  # within the output folder

RESULT_ENDINGS = (".png", ".mp4", ".html")

logger = logging.getLogger(__name__)


class InputFile(NamedTuple):
    """A file to predict, and the name of its results: a path below their folder, without an ending."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(inputs: Sequence[Path], output_dir: Path) -> list[InputFile]:
    """The files of ``--input``; folders are searched with all below them, through links too.

    Hidden files and results of earlier calls are passed over; what else is left out is named in a warning.

    Results are named after the files, those of a folder by their path in it. Where several would have one
    name, the ending becomes a part of it (``a_jpg``, ``a_png``), and if they still do, a number.

    Raises:
        DataError: no such input, a folder that is empty or without pictures.
        UsageError: results would be written over their own input.
    """
    found: dict[Path, tuple[Path, str]] = {}  # a file that is given twice is one
    for path in inputs:
        if path.is_dir():
            if path.resolve() == output_dir.resolve():
                raise UsageError(f"--output-dir {output_dir} is the input folder; give another one")
            for file in _search(path, output_dir):
                name = file.relative_to(path).with_suffix("").as_posix()
                found.setdefault(file.absolute(), (file, name))
        elif path.is_file():
            found.setdefault(path.absolute(), (path, path.stem))
        else:
            raise DataError(f"{path}: no such input")
    for path, _ in found.values():
        if any(path.resolve().is_relative_to((output_dir / folder).resolve()) for folder in FOLDERS):
            raise UsageError(f"{path} lies where results of --output-dir {output_dir} go; give another one")
    files = list(found.values())
    return [InputFile(path, name) for (path, _), name in zip(files, _distinct(files), strict=True)]


def _search(folder: Path, output_dir: Path) -> list[Path]:
    results = [(output_dir / name).resolve() for name in (*FOLDERS, LEGEND)]  # of an earlier call
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files = list(_files_below(folder))
    found: list[Path] = []
    others: list[Path] = []
    for path in files:
        if not is_hidden(path, folder) and not any(
            path.resolve().is_relative_to(result) for result in results
        ):
            (found if path.suffix.lower() in suffixes else others).append(path)
    if not files:
        if any(entry.name in (*FOLDERS, LEGEND) for entry in folder.iterdir()):
            raise DataError(f"{folder}: holds nothing but results of an earlier call")
        raise DataError(f"{folder}: this folder is empty")
    if not found:
        raise DataError(
            f"{folder}: no picture or video in this folder and those below it (.png, .jpg, .tif, .mp4 …)"
        )
    if others:
        logger.warning(
            "%s: %d of %d files are no pictures or videos by their endings and are left out: %s",
            *(folder, len(others), len(found) + len(others), name_some(others, folder)),
        )
    return found


def _files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files within, in order, but for results of earlier calls. A link to a folder above ends there."""
    real = folder.resolve()
    if real in above:
        return
    entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    results = (*FOLDERS, LEGEND) if {LEGEND, "colour", "ids"} <= names else ()
    for entry in entries:
        if entry.is_dir() and entry.name not in results:
            yield from _files_below(entry, above | {real})
        elif entry.name not in results:
            yield entry


def _distinct(files: Sequence[tuple[Path, str]]) -> list[str]:
    """Names that differ also where file systems ignore the case, and whose files are no folders of others."""
    counts = Counter(name.casefold() for _, name in files)
    folders = {folder.as_posix().casefold() for _, name in files for folder in PurePosixPath(name).parents}
    used: set[str] = set()
    names = []
    for path, name in files:
        if counts[name.casefold()] > 1 or any((name + end).casefold() in folders for end in RESULT_ENDINGS):
            name += "_" + path.suffix[1:].lower()
        distinct, number = name, 1
        while distinct.casefold() in used or (number > 1 and distinct.casefold() in counts):
            number += 1
            distinct = f"{name}_{number}"
        used.add(distinct.casefold())
        names.append(distinct)
    return names
