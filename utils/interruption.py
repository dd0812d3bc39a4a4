"""Signals that ask a run to stop: it goes on to a place where nothing is lost."""

import os
import signal
from collections.abc import Iterable, Iterator
from itertools import takewhile
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interruption:
    """Within its context SIGTERM and SIGINT are noted, not obeyed; a second SIGINT ends the run at once.

    Attributes:
        signum: the signal that came, 0 for none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until(self, samples: Iterable[T], fault: type[Exception]) -> Iterator[T]:
        """The samples up to a signal, which may end those who read them with ``fault``."""
        try:
            yield from takewhile(lambda _: not self.signum, samples)
        except fault:
            if not self.signum:
                raise

    def _note(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT == self.signum:
            raise KeyboardInterrupt
        if not self.signum and os.environ.get("RANK", "0") == "0":
            # Not print: its lock may be held by what was interrupted.
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: stopping after this step\n".encode())
        self.signum = signum
