"""The memory of a long run on a CPU stays flat. (``startup`` limits glibc's arenas, which is not enough.)"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

GROWTH = 1.5


class FreedMemory:
    """Gives back to the system what glibc keeps of freed memory.

    A step frees tensors of many sizes in an order that leaves holes, and a run grows for thousands of steps
    though it holds no more. Mapping each tensor anew would prevent that, but costs a fifth of a step; so this
    waits until the process has grown by half. On systems that cannot be asked nothing is done.
    """

    def __init__(self) -> None:
        self._limit = 0.0
        self._trim: Callable[[int], object] | None
        try:
            self._trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):
            self._trim = None

    def give_back(self) -> None:
        """To be called once in a few steps; the first call tells the usual size."""
        resident = resident_bytes()
        if self._trim is None or resident <= self._limit:
            return
        if self._limit:
            self._trim(0)
            resident = resident_bytes()
        self._limit = max(self._limit, GROWTH * resident)


def resident_bytes() -> int:
    """The memory of this process that is not swapped out; 0 where there is no /proc."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
