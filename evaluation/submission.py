"""Predictions for the benchmark server of Cityscapes: a zip of label ids."""

import io
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import DataError, LabelTable, Sample
from utils.arguments import OutputError

# The server finds a prediction by the beginning of its name.
NAME = re.compile(r"^[A-Za-z-]+_\d{6}_\d{6}(?=_|$)")


class Submission:
    """Packs predicted label ids as ``<city>_<sequence>_<frame>_pred_labelIds.png``; a ``pictures.Save``.

    Each process packs its own images beside ``path``; ``finish`` joins the parts in one of them.

    Args:
        path: the zip file to write.
        labels: of the data set, whose stored ids the server wants.

    Raises (also when called):
        OutputError: a file cannot be written.
        DataError: an image whose name the server would not know.
    """

    def __init__(self, path: Path, labels: LabelTable, rank: int = 0, world_size: int = 1) -> None:
        self.path, self.labels = path, labels
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; name the zip file to write")
        self.parts = [path.with_name(f".{path.name}.part{index}") for index in range(world_size)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self.parts[rank], "w", zipfile.ZIP_STORED)
        except OSError as error:
            raise OutputError(f"{path}: cannot write there ({error.strerror})") from None

    def __call__(self, sample: Sample, prediction: np.ndarray) -> None:
        name = NAME.match(sample.name)
        if name is None:
            raise DataError(f"{sample.name}: a submission's images are called <city>_<sequence>_<frame>_…")
        png = io.BytesIO()
        Image.fromarray(self.labels.decode(prediction)).save(png, "png")
        try:
            self._zip.writestr(f"{name[0]}_pred_labelIds.png", png.getvalue())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Complete this process's part.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self._zip.close()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def finish(self) -> int:
        """Join all parts, in one process after all have closed theirs; returns the number of predictions."""
        first, *others = self.parts
        try:
            with zipfile.ZipFile(first, "a", zipfile.ZIP_STORED) as whole:
                for part in others:
                    with zipfile.ZipFile(part) as more:
                        for name in more.namelist():
                            whole.writestr(name, more.read(name))
                count = len(whole.namelist())
            first.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None
        finally:
            self.remove_parts()
        return count

    def remove_parts(self) -> None:
        """Leave nothing unfinished behind."""
        with suppress(OSError):  # of a full disk
            self._zip.close()
        for part in self.parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)
