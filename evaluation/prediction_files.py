"""Files that ``predict.py`` writes: colours, stored ids, overlays, and the legend of the colours."""

import io
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset import LabelTable
from utils.arguments import OutputError

LEGEND_ROWS = 30


def prepare_folder(output_dir: Path, folders: tuple[str, ...]) -> None:
    """Make the output folder and those within it.

    Raises:
        OutputError: they cannot be made or written to.
    """
    try:
        for name in folders:
            (output_dir / name).mkdir(parents=True, exist_ok=True)
            probe = output_dir / name / ".probe"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot write results there ({error.strerror})") from None


def write_picture(path: Path, picture: np.ndarray, compression: int = 1) -> None:
    """Write a PNG of (H,W) or (H,W,3) uint8 RGB; low compression is several times as fast.

    Raises:
        OutputError: it cannot be written; nothing is left of it.
    """
    stored = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".png", stored, (cv2.IMWRITE_PNG_COMPRESSION, compression))[1]
    write_bytes(path, encoded.tobytes())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file, whose folder is made.

    Raises:
        OutputError: it cannot be written; nothing is left of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot write this file ({error.strerror or error})") from None


def overlay(image: np.ndarray, ids: np.ndarray, labels: LabelTable) -> np.ndarray:
    """Half the picture, half the colours of its classes, (H,W,3) uint8 RGB."""
    return cv2.addWeighted(image, 0.5, labels.colour(ids), 0.5, 0)


def write_prediction(
    output_dir: Path, name: str, image: np.ndarray, ids: np.ndarray, labels: LabelTable
) -> None:
    """``colour/<name>.png``, ``ids/<name>.png`` (stored ids) and ``overlay/<name>.png``.

    Raises:
        OutputError: one cannot be written.
    """
    write_picture(output_dir / "colour" / f"{name}.png", labels.colour(ids))
    write_picture(output_dir / "ids" / f"{name}.png", labels.decode(ids))
    write_picture(output_dir / "overlay" / f"{name}.png", overlay(image, ids, labels))


def write_legend(path: Path, labels: LabelTable) -> None:
    """A picture of each class's colour, the id that ``ids/`` holds for it, and its name."""
    font = ImageFont.load_default(size=16)
    lines = [f"{stored:>3}  {name}" for stored, name in zip(labels.ids, labels.names, strict=True)]
    width = 60 + round(max(font.getlength(line) for line in lines))
    columns, rows = -(-len(lines) // LEGEND_ROWS), min(len(lines), LEGEND_ROWS)
    picture = Image.new("RGB", (columns * width + 8, rows * 28 + 8), "white")
    draw = ImageDraw.Draw(picture)
    for index, (line, colour) in enumerate(zip(lines, labels.palette, strict=True)):
        left, top = 8 + index // LEGEND_ROWS * width, 8 + index % LEGEND_ROWS * 28
        draw.rectangle((left, top, left + 32, top + 20), fill=colour, outline="black")
        draw.text((left + 40, top + 10), line, fill="black", font=font, anchor="lm")
    contents = io.BytesIO()
    picture.save(contents, "PNG")
    write_bytes(path, contents.getvalue())
