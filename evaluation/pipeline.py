"""Reading and writing in threads beside the network. Decoders and encoders release Python's lock."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], workers: int = 2, ahead: int = 4
) -> Iterator[tuple[Item, Future[Result]]]:
    """``read(item)`` of all items, in their order; up to ``ahead`` of them are read early."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            yield from waiting
        finally:
            for _, future in waiting:
                future.cancel()


def iterate_ahead(items: Iterable[Item], ahead: int = 4) -> Generator[Item]:
    """The items of an iterable that a thread goes through, up to ``ahead`` of them early.

    An exception of the iterable comes after the items before it.
    """
    done = object()
    results: queue.Queue[Any] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(result: Any) -> bool:
        while not stopped.is_set():
            try:
                results.put(result, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((done, None))
        except BaseException as error:
            put((done, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


class Background(AbstractContextManager["Background"]):
    """Runs functions in threads while the caller goes on; with one worker in the order they were given.

    Leaving the context waits for all of them. The first exception of one is raised there, or before by
    ``run``.

    Args:
        workers: threads.
        waiting: calls that may wait; ``run`` blocks when there are more.
    """

    def __init__(self, workers: int = 1, waiting: int = 8) -> None:
        self._pool, self._futures, self._waiting = ThreadPoolExecutor(workers), deque[Future[None]](), waiting

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function(*arguments)`` in a thread."""
        while self._futures and (self._futures[0].done() or len(self._futures) > self._waiting):
            self._futures.popleft().result()
        self._futures.append(self._pool.submit(function, *arguments))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            for future in self._futures:
                future.cancel()
        self._pool.shutdown()
        if kind is None:
            for future in self._futures:
                future.result()
