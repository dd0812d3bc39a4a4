"""Reading images and labels, with one clear line for whatever is wrong with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from dataset.labels import DataError, LabelTable
from dataset.source import Pair

# Pillow refuses pictures above 179 million pixels as an attack. The data are the user's own, and aerial and
# microscope pictures are larger.
Image.MAX_IMAGE_PIXELS = None

# GIF writers renumber palettes to make them smaller.
FORMATS_THAT_CHANGE_VALUES = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "GIF")
LOSSY_TIFF_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")

# Grey values of 2 and 4 bits, which Pillow multiplies by this to spread them over 0 .. 255.
SPREAD = {"L;2": 85, "L;4": 17}


def read_image(path: Path) -> np.ndarray:
    """An image file as (H,W,3) uint8 RGB, turned upright as its orientation tag (EXIF) says.

    Grey values of 16 bits are divided by 257 (65535 → 255) and rounded; of colours with 16 bits a channel
    the upper byte is taken, which differs from that by at most 1.

    Raises:
        DataError: no such file, a damaged one, or pixels that have no defined range of 0 .. 255: 12, 32 or
            signed 16 bits, floating point, and 16-bit files that hold 8-bit values.
    """
    with _decoded(path, "image") as image:
        stored_as = _stored_as(image)
        image.load()
        is_pgm = image.mode == "I" and stored_as == "I;16B"  # 0 .. 65535, unlike other images of mode I
        if (image.mode in ("I", "F") and not is_pgm) or "12" in stored_as:
            raise DataError(
                f"{path}: an image needs 8 or 16 bits a channel, this one has "
                f"{_in_words(image.mode, stored_as)}; scale it to 8 bits"
            )
        if _orientation(image) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        if not (is_pgm or image.mode.startswith("I;16")):
            image.info.pop("transparency", None)  # which Pillow would warn of in palettes
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            if ";16" in stored_as and not pixels.any():
                values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
                _refuse_small_values(path, 0 if values is None else int(values[..., :3].max()))
            return pixels
        values = np.asarray(image)
        _refuse_small_values(path, int(values.max()))
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)


def _refuse_small_values(path: Path, largest: int) -> None:
    """Divided by 257, 8-bit values in a 16-bit file would all become black."""
    if 0 < largest < 256:
        raise DataError(
            f"{path}: this image has 16 bits a channel but no value above {largest}; store it with 8 bits"
        )


def read_label(path: Path) -> np.ndarray:
    """A label file as (H,W) uint8: the stored values of a grey or palette image of 1, 2, 4 or 8 bits.

    An orientation tag is applied as it is to images.

    Raises:
        DataError: no such file, a damaged one, one of a lossy format, colours, or more than 8 bits.
    """
    with _decoded(path, "label") as image:
        stored_as = _stored_as(image)
        compression = image.info.get("compression")
        if image.format in FORMATS_THAT_CHANGE_VALUES or compression in LOSSY_TIFF_COMPRESSIONS:
            kind = f"{image.format} ({compression})" if image.format == "TIFF" else image.format
            raise DataError(
                f"{path}: this label was saved as {kind}, which changes label values; "
                "save the original label as PNG"
            )
        # A PGM whose largest value is not 255 is scaled to 255 when it is read.
        scaled = image.format == "PPM" and any(tile[0] != "raw" for tile in image.tile)
        changed = stored_as.startswith(("L;", "1;")) and stored_as not in SPREAD
        if scaled or changed or image.mode not in ("1", "L", "P"):
            raise DataError(
                f"{path}: a label is a grey or palette PNG of at most 8 bits with one class number a pixel, "
                f"this one has {'scaled values' if scaled else _in_words(image.mode, stored_as)}; convert it"
            )
        if _orientation(image) != 1:
            ImageOps.exif_transpose(image, in_place=True)
        values = np.array(image, dtype=np.uint8)  # True and False of 1 bit become 1 and 0
        return values // SPREAD[stored_as] if stored_as in SPREAD else values


def _stored_as(image: ImageFile.ImageFile) -> str:
    """Pillow's raw mode, such as "RGB;16B" or "L;4", which tells of bits that ``image.mode`` hides."""
    for tile in image.tile:
        arguments = tile[3]
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        return first if isinstance(first, str) else ""
    return ""


def _in_words(mode: str, stored_as: str) -> str:
    if stored_as.endswith(";I"):
        return "inverted values (0 is white)"
    if "12" in stored_as or "16" in mode + stored_as:
        return f"{'12' if '12' in stored_as else '16'} bits a channel ({stored_as})"
    words = {"I": "32 bits a channel", "F": "floating-point numbers", "L": "other than whole bytes"}
    return f"{words.get(mode, 'colours or transparency')} ({mode})"


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 .. 8; 1 is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata do not damage the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


@contextmanager
def _decoded(path: Path, kind: str) -> Iterator[ImageFile.ImageFile]:
    """An open image, whose faults become a DataError.

    Pillow decodes, because OpenCV returns a half-grey picture for a truncated file and says nothing.
    """
    size = ""
    try:
        # Given a path, Pillow maps TIFFs into memory, and some that are to be turned with the sides swapped.
        with path.open("rb") as file, Image.open(file) as image:
            size = f" of {image.width}x{image.height} pixels"
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such {kind}") from None
    except MemoryError:
        raise DataError(
            f"{path}: not enough memory for this {kind}{size}; cut it into smaller ones"
        ) from None
    except Exception as error:  # whatever Pillow's decoders raise for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot read this {kind} ({error.strerror})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: unreadable or truncated {kind} ({reason})") from None


def read_sample(pair: Pair, labels: LabelTable, ignore_label: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (H,W,3) uint8 RGB and its train ids (H,W) uint8, or None where the sample has no label.

    Raises:
        DataError: as ``read_image`` and ``read_label``; sizes that differ; a label value of no class.
    """
    image = read_image(pair.image)
    if pair.label is None:
        return image, None
    label = read_label(pair.label)
    if label.shape != image.shape[:2]:
        raise DataError(_sizes_differ(pair.image, image, pair.label, label))
    try:
        return image, labels.encode(label, ignore_label)
    except DataError as error:
        raise DataError(f"{pair.label}: {error}") from None


def _sizes_differ(image_path: Path, image: np.ndarray, label_path: Path, label: np.ndarray) -> str:
    message = (
        f"{image_path} is {image.shape[1]}x{image.shape[0]} but its label {label_path} "
        f"is {label.shape[1]}x{label.shape[0]}"
    )
    for path in (image_path, label_path):
        with _decoded(path, "file") as file:
            if _orientation(file) >= 5:
                message += (
                    f"; {path.name} was turned by a quarter as its orientation tag (EXIF) says: "
                    "turn the other file too, or remove the tag"
                )
    return message
