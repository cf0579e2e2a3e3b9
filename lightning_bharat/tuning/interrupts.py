"""Ctrl-C once: no new trials; twice, or SIGTERM: none at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, SIGINT and SIGTERM set what a loop looks at; they interrupt nothing by themselves.

    Ranks lead process groups of their own, so that a terminal's Ctrl-C does not reach them.

    Args:
        say: told once what a second Ctrl-C does.

    Attributes:
        after_trials: no new trial is to be started.
        now: running trials are to be killed.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[int, Any] = {}
        self.after_trials = self.now = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.after_trials or number == signal.SIGTERM:
            self.now = True
        elif not self.after_trials:
            self._say(
                "running trials are finished; Ctrl-C once more kills them. The same command goes on with the study"
            )
        self.after_trials = True
