"""Saves that are written beside training, by a thread, which leaves the process group to training."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_bharat.checkpoints.errors import CheckpointError, in_words

T = TypeVar("T")
U = TypeVar("U")
LONGEST_PAUSE = 0.2  # seconds between two looks into the store


class Background:
    """Runs steps one after another on a thread of its own. After one has failed the rest is left out, until
    :meth:`take_error`: what follows a save is for a checkpoint that is there.

    The thread does not keep the process from ending: a save is whole or it is not there.
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._left = 0
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether all steps have been done, or left out."""
        return self._left == 0

    def do(self, step: Callable[[], None]) -> None:
        """Run ``step`` after those that were given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        with self._changed:
            self._left += 1
        self._steps.put(step)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all steps have been done, for ``seconds`` at most; returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: self._left == 0, seconds)

    def take_error(self) -> Exception | None:
        """What the first step that failed raised; steps are run again after this. Call it when it :attr:`is_idle`."""
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            if self._error is None:
                try:
                    step()
                except Exception as error:
                    self._error = error
            with self._changed:
                self._left -= 1
                self._changed.notify_all()


class InStore:
    """Ranks that come to know by the rendezvous store that they are ready
    (:class:`~lightning_bharat.checkpoints.saving.Ranks`).

    The store asks for no rank's main thread, and a rank that has died can't break it, unless it hosts it. All ranks
    make one, and use it in the same order.

    Args:
        store: of the process group; a connection of its own is made.
        rank, size: this rank, and how many there are.
        lost: in words, that a rank has died and will not come; "" as long as none has.
        timeout: seconds to wait for the others.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, lost: Callable[[], str] = str, timeout: float = 1800
    ) -> None:
        self._store = store.clone() if size > 1 else store
        self._rank, self._size, self._lost, self._timeout = rank, size, lost, timeout
        self._number = 0

    def finish(self, own: Callable[[], T], last: Callable[[list[T]], U]) -> U:
        """Run ``own`` on every rank, then ``last`` on rank 0, with what ``own`` returned (as JSON can say it).

        Returns:
            What ``last`` returned (as JSON can say it), on every rank.

        Raises:
            CheckpointError: on every rank with the same words, where one of them failed; or a rank is gone.
        """
        self._number += 1
        if self._size == 1:
            return last([own()])
        mine = _tried(own)
        try:
            self._store.set(f"{self._number}/{self._rank}", json.dumps(mine))
            self._store.add(f"{self._number}/ready", 1)
            value, said = self._end(last) if self._rank == 0 else self._hear()
        except dist.DistError as error:
            why = self._lost() or f"the store that rank 0 hosts does not answer ({error})"
            raise CheckpointError(f"the save was left: {why}") from error
        if said:
            raise CheckpointError(said)
        return value

    def _end(self, last: Callable[[list[T]], U]) -> tuple[Any, str]:
        """On rank 0: wait for all, do the last part, and tell; returns what came of it, and what went wrong."""
        number, value = self._number, None
        said = self._wait(lambda: self._store.add(f"{number}/ready", 0) == self._size)
        if not said:
            keys = [f"{number}/{rank}" for rank in range(self._size)]
            everyone = [json.loads(text) for text in self._store.multi_get(keys)]
            said = next((words for _, words in everyone if words), "")
            if not said:
                value, said = _tried(lambda: last([value for value, _ in everyone]))
            for key in (*keys, f"{number}/ready", f"{number - 1}/done"):  # all have read that
                self._store.delete_key(key)
        self._store.set(f"{number}/done", json.dumps([value, said]))
        return value, said

    def _hear(self) -> tuple[Any, str]:
        key = f"{self._number}/done"
        lost = self._wait(lambda: self._store.check([key]))
        return (None, lost) if lost else json.loads(self._store.get(key))

    def _wait(self, ready: Callable[[], bool]) -> str:
        """Why it is of no use to wait longer; "" when ``ready``."""
        pause, end = 0.001, time.monotonic() + self._timeout
        while not ready():
            if lost := self._lost():
                return f"the save was left: {lost}"
            if time.monotonic() > end:
                return f"the save was left: not all ranks had written their part after {self._timeout:.0f} s"
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
        return ""


def _tried(function: Callable[[], Any]) -> tuple[Any, str]:
    """What ``function`` returns, and what went wrong, in words."""
    try:
        return function(), ""
    except Exception as error:
        return None, in_words(error)
