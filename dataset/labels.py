"""How a data set numbers, names and colours its classes."""

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np


class DataError(ValueError):
    """A fault in the user's data: one line that names the file, the fault and what to do."""

    exit_status = 1


class DataUsageError(DataError):
    """Options that name no data set, or too little of one."""

    exit_status = 2


@dataclass(frozen=True)
class LabelTable:
    """One table for the ids stored in label files, the classes trained on, and their colours.

    Args:
        names: class names, in the order of their train ids 0 .. num_classes - 1.
        ids: the value that label files store for each class, 0 .. 255.
        palette: RGB colour of each class.
        ignored_ids: further values that label files may hold; they are not trained on and not scored.
        mirror_pairs: train ids of classes that swap when an image is mirrored, such as left and right arm.

    Raises:
        ValueError: lists of different lengths, one id for two classes, a name that is no text, values outside
            0 .. 255.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignored_ids: tuple[int, ...] = ()
    mirror_pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.ids) == len(self.palette):
            raise ValueError(
                f"a label table needs as many names ({len(self.names)}) as ids ({len(self.ids)}) "
                f"and colours ({len(self.palette)})"
            )
        for name in self.names:
            if not isinstance(name, str):
                raise ValueError(f"names of classes are texts, got {name!r}")
        for value in (*self.ids, *self.ignored_ids):
            if not 0 <= value <= 255:
                raise ValueError(f"a label table holds values 0..255, got {value}")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"each class has an id of its own, got {self.ids}")
        for colour in self.palette:
            is_triple = isinstance(colour, tuple | list) and len(colour) == 3
            if not (is_triple and all(isinstance(x, Integral) and 0 <= x <= 255 for x in colour)):
                raise ValueError(f"a colour is three whole numbers 0..255, got {colour!r}")
        for pair in self.mirror_pairs:
            if not all(0 <= train_id < self.num_classes for train_id in pair):
                raise ValueError(f"mirror_pairs holds train ids 0..{self.num_classes - 1}, got {pair}")

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def known_values(self) -> bytes:
        """All values that label files may hold."""
        return bytes({*self.ids, *self.ignored_ids})

    def encode(self, stored: np.ndarray, ignore_label: int = 255) -> np.ndarray:
        """Stored label values (H,W) uint8 → train ids (H,W) uint8, ignored ones as ``ignore_label``.

        Raises:
            DataError: a value that the data set does not define.
        """
        train_id_of = bytearray([ignore_label] * 256)
        for train_id, value in enumerate(self.ids):
            train_id_of[value] = train_id
        # Bytes are translated without an index array of 8 bytes a pixel.
        values = bytearray(stored.tobytes())
        unknown = sorted(set(values.translate(None, self.known_values)))
        if unknown:
            raise DataError(
                f"holds label value {', '.join(map(str, unknown[:5]))}, "
                f"which is none of the {self.num_classes} classes and not ignored"
            )
        return np.frombuffer(values.translate(bytes(train_id_of)), np.uint8).reshape(stored.shape)

    def decode(self, train_ids: np.ndarray) -> np.ndarray:
        """Train ids (H,W) → the values that label files store, uint8, as benchmark servers want them."""
        return np.take(np.asarray(self.ids, np.uint8), train_ids)

    def colour(self, train_ids: np.ndarray) -> np.ndarray:
        """Train ids (H,W) → RGB picture (H,W,3) uint8; whatever is not a class becomes black."""
        colours = np.zeros((256, 3), np.uint8)
        colours[: self.num_classes] = self.palette
        return np.take(colours, train_ids, axis=0)


def generic_table(num_classes: int, ignore_label: int = 255) -> LabelTable:
    """The table of a data set that stores train ids 0 .. N-1 directly, with PASCAL VOC's colours.

    With ``ignore_label`` 0 the classes are stored as 1 .. N instead, and 0 is not trained on.
    """
    first = 1 if ignore_label == 0 else 0
    return LabelTable(
        names=tuple(f"class {index}" for index in range(num_classes)),
        ids=tuple(range(first, first + num_classes)),
        palette=tuple(_voc_colour(index) for index in range(num_classes)),
        ignored_ids=(ignore_label,),
    )


def _voc_colour(index: int) -> tuple[int, int, int]:
    """PASCAL VOC's colour map: bit 3j+c of the index is bit 7-j of channel c."""
    red, green, blue = (
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    )
    return red, green, blue
