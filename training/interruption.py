"""Signals that ask a run to stop: it finishes its step, so that nothing is lost."""

import os
import signal
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from types import FrameType
from typing import Any, TypeVar

from dataset import DataError
from utils.distributed import Process

T = TypeVar("T")
FAILED = 100  # larger than any signal's number


class Interruption:
    """Within its context SIGTERM, SIGINT and SIGHUP are recorded; a second SIGINT ends the run at once.

    Those that are ignored, as SIGHUP under nohup, stay so.

    Attributes:
        signum: the signal that came, 0 for none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def next_batch(self, batches: Iterator[T], process: Process) -> T | None:
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
            with suppress(OSError):
                os.write(2, f"\n{name}: stopping after this step\n".encode())
        if signum == signal.SIGHUP:
            _leave_terminal()
        self.signum = signum


def _leave_terminal() -> None:
    """Discard what would go to a terminal that is gone: the attempt would end the run with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)
