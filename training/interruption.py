"""Signals that ask a run to stop: it finishes its step, so that nothing is lost."""

import os
import signal
from collections.abc import Iterable, Iterator
from itertools import takewhile
from types import FrameType
from typing import Any, TypeVar

from dataset import DataError
from utils.distributed import Process

T = TypeVar("T")
FAILED = 100  # larger than any signal's number


class Interruption:
    """Within its context SIGTERM and SIGINT are recorded; a second SIGINT ends the run at once.

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

    def next(self, batches: Iterator[T], process: Process) -> T | None:
        """The next batch; None if a signal came to any process.

        Raises:
            DataError, OSError, MemoryError: this process's fault in reading it; PeerError in the others.
        """
        batch, fault = None, None
        if not self.signum:
            try:
                batch = next(batches)
            except (DataError, OSError, MemoryError) as error:
                if not self.signum:  # a signal may have ended a worker
                    fault = error
        state = process.max(self.signum if fault is None else FAILED)
        if state == FAILED:
            process.raise_if_any_failed(fault)
        if state:  # only then: a signal may have come meanwhile
            self.signum = state
        return None if state else batch

    def until(self, samples: Iterable[T]) -> Iterator[T]:
        """The samples up to a signal, which may also end the workers that read them."""
        try:
            yield from takewhile(lambda _: not self.signum, samples)
        except DataError:
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
