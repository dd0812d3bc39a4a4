"""How a data set numbers, names and colours its classes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


class DataError(ValueError):
    """A fault in the user's data: one line that names the file, the fault and what to do."""


@dataclass(frozen=True)
class LabelTable:
    """One table for the ids stored in label files, the classes trained on, and their colours.

    Args:
        names: class names, in the order of their train ids 0 .. num_classes - 1.
        ids: the value that label files store for each class.
        palette: RGB colour of each class.
        ignored_ids: further values that label files may hold; they are not trained on and not scored.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignored_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.ids) == len(self.palette)

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def _train_id_of(self) -> np.ndarray:
        """(256,) int16: train id of each stored value; -1 ignored, -2 unknown."""
        train_id_of = np.full(256, -2, np.int16)
        train_id_of[list(self.ignored_ids)] = -1
        train_id_of[list(self.ids)] = np.arange(self.num_classes)
        return train_id_of

    def encode(self, stored: np.ndarray, ignore_label: int = 255) -> np.ndarray:
        """Stored label values (H,W) uint8 → train ids (H,W) uint8, ignored ones as ``ignore_label``.

        Raises:
            DataError: a value that the data set does not define.
        """
        train_ids = self._train_id_of[stored]
        if train_ids.size and train_ids.min() == -2:
            unknown = np.unique(stored[train_ids == -2])
            raise DataError(
                f"holds label value {', '.join(map(str, unknown[:5]))}, "
                f"which is none of the {self.num_classes} classes and not ignored"
            )
        return np.where(train_ids < 0, ignore_label, train_ids).astype(np.uint8)

    def decode(self, train_ids: np.ndarray) -> np.ndarray:
        """Train ids (H,W) → the values that label files store, uint8, as benchmark servers want them."""
        return np.take(np.asarray(self.ids, np.uint8), train_ids)

    def colour(self, train_ids: np.ndarray) -> np.ndarray:
        """Train ids (H,W) → RGB picture (H,W,3) uint8; whatever is not a class becomes black."""
        colours = np.zeros((256, 3), np.uint8)
        colours[: self.num_classes] = self.palette
        return np.take(colours, train_ids, axis=0)


def generic_table(num_classes: int, ignore_label: int = 255) -> LabelTable:
    """The table of a data set that stores train ids directly, with PASCAL VOC's colours."""
    return LabelTable(
        names=tuple(f"class {index}" for index in range(num_classes)),
        ids=tuple(range(num_classes)),
        palette=tuple(_voc_colour(index) for index in range(num_classes)),
        ignored_ids=(ignore_label,),
    )


def _voc_colour(index: int) -> tuple[int, int, int]:
    """PASCAL VOC's colour map: bit 3j+c of the index is bit 7-j of channel c."""
    red, green, blue = (
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    )
    return red, green, blue
