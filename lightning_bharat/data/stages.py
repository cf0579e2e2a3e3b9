"""Stages of a pipeline that work at the same time, with bounded queues between them, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

AHEAD = 4  # items that a stage may be ahead of the next one
LOOKS_EVERY = 0.1  # seconds, at whether anyone still wants what a full queue holds


class Stages:
    """Makes stages, and keeps how long each has worked.

    Args:
        threads: of a stage that has no order to keep inside; 0: all stages run in the caller, one after another.

    Attributes:
        busy: seconds of work by a stage's name, without its waits for other stages.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.busy: dict[str, float] = {}

    def each(self, name: str, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        """``function`` of each item, in their order; of several at the same time."""
        if not self.threads:
            return (self.timed(name, function, item) for item in items)
        return self._pooled(name, function, items)

    def beside(self, name: str, items: Iterable[Out], ahead: int = AHEAD) -> Iterator[Out]:
        """``items``, made in a thread of their own, ``ahead`` of the caller. What they raise is raised in its place."""
        return _Beside(name, items, ahead) if self.threads else iter(items)

    def work(self, name: str, items: Iterator[Out], waits: Callable[[], float]) -> Iterator[Out]:
        """``items``, whose making counts as the work of ``name``, less what ``waits`` says grew in it."""
        while True:
            began, waited = time.perf_counter(), waits()
            item = next(items, _END)
            self._add(name, time.perf_counter() - began - (waits() - waited))
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def _pooled(self, name: str, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        with ThreadPoolExecutor(self.threads, f"{name}-") as pool:
            waiting: deque[Future[Out]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(self.timed, name, function, item))
                    if len(waiting) > self.threads + 1:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def timed(self, name: str, function: Callable[[In], Out], item: In) -> Out:
        """``function`` of ``item``, which counts as the work of ``name``."""
        began = time.perf_counter()
        try:
            return function(item)
        finally:
            self._add(name, time.perf_counter() - began)

    def _add(self, name: str, seconds: float) -> None:
        self.busy[name] = self.busy.get(name, 0.0) + seconds


class Clock:
    """An iterator that keeps how long one waited for it.

    Attributes:
        seconds: so far.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> Clock:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - began


class _Beside(Iterator[Out]):
    """The thread is a daemon and holds no process; it ends when nobody holds this object any more."""

    def __init__(self, name: str, items: Iterable[Out], ahead: int) -> None:
        self._queue: Queue[tuple[Any, BaseException | None]] = Queue(ahead)
        self._closed = threading.Event()
        arguments = (iter(items), self._queue, self._closed)
        threading.Thread(target=_fill, args=arguments, name=name, daemon=True).start()
        self._ended = False

    def __next__(self) -> Out:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None or item is _END:
            self._ended = True
            raise error or StopIteration
        return item

    def __del__(self) -> None:
        self._closed.set()


def _fill(items: Iterator[Any], queue: Queue[tuple[Any, BaseException | None]], closed: threading.Event) -> None:
    def put(item: Any, error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                return queue.put((item, error), timeout=LOOKS_EVERY)
            except Full:
                continue

    try:
        for item in items:
            put(item)
            if closed.is_set():
                return
    except BaseException as error:
        put(None, error)
    else:
        put(_END)


_END = object()
