"""The scenes as files, in the layout of Cityscapes."""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

from dataset.demo.scene import draw_scene
from dataset.labels import DataError

SPLITS = {"train": (0, "demotown"), "val": (1, "demoville")}  # number in the seed, name of the city
VERSION = 1  # of the drawing; raise it when scenes change, so that older folders are not taken for new ones


def layout(num_train: int, num_val: int) -> Iterator[tuple[int, int, str, str]]:
    """Split number, index, image and label file of every scene, as Cityscapes names them."""
    for (split, (number, city)), count in zip(SPLITS.items(), (num_train, num_val), strict=True):
        for index in range(count):
            stem = f"{split}/{city}/{city}_{index:06d}_000019"
            yield number, index, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"


def generate(
    root: Path, num_train: int = 48, num_val: int = 12, height: int = 256, width: int = 512, seed: int = 0
) -> bool:
    """Write the demo data in the layout of Cityscapes; a complete folder of the same settings is left alone.

    Returns:
        Whether it was written; False if it was there.

    Raises:
        DataError: the folder holds something else.
    """
    root = root.resolve()
    settings = {"num_train": num_train, "num_val": num_val, "height": height, "width": width, "seed": seed}
    settings["version"] = VERSION
    if _is_complete(root, settings):
        return False
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(f"{root}: holds something other than this demo data; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Only the rename at the end makes the folder appear, so a folder that is there is never half written.
    _remove_abandoned(root)
    with _workspace(root) as partial:
        for number, index, *files in layout(num_train, num_val):
            scene = draw_scene(np.random.default_rng([seed, number, index]), height, width)
            for file, picture in zip(files, scene, strict=True):
                _write(partial / file, picture)
        (partial / "demo.json").write_text(json.dumps(settings, indent=2) + "\n")
        try:
            partial.replace(root)
        except OSError as error:
            # Another process may have made the same folder in the meantime.
            if not _is_complete(root, settings):
                raise DataError(f"{root}: cannot be put in place: {error.strerror}") from error
            return False
    return True


SUFFIX = ".ccnet-demo-partial"


@contextmanager
def _workspace(root: Path) -> Iterator[Path]:
    """A hidden folder beside the output, locked while this process lives and removed at the end."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", suffix=SUFFIX, dir=root.parent))
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():  # another process may have taken it for abandoned before it was locked
                break
            os.close(lock)
    try:
        yield temporary / root.name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(root: Path) -> None:
    """Remove what killed processes left; a lock ends with the process that held it."""
    for folder in root.parent.glob(f".{glob.escape(root.name)}-*{SUFFIX}"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _write(file: Path, picture: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(file), picture):
        raise OSError(f"{file}: cannot be written")


def _is_complete(root: Path, settings: dict[str, int]) -> bool:
    """Whether the folder was made with these settings and lacks no file."""
    try:
        if json.loads((root / "demo.json").read_text()) != settings:
            return False
    except (OSError, ValueError):
        return False
    scenes = layout(settings["num_train"], settings["num_val"])
    return all((root / file).is_file() for _, _, *files in scenes for file in files)
