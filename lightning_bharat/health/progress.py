"""How far a rank's main thread is, told by it in some nanoseconds and read by threads."""

from __future__ import annotations

import threading
import time


class Progress:
    """Attributes:
    count: hooks that were passed.
    phase: the last of them, in words.
    at: when (``time.monotonic``).
    """

    def __init__(self) -> None:
        self.count, self.phase, self.at = 0, "start", time.monotonic()
        self.thread, self.native = threading.get_ident(), threading.get_native_id()
        self.step = 0

    def passed(self, phase: str) -> None:
        """The main thread is here."""
        self.count += 1
        self.phase = phase
        self.at = time.monotonic()

    def still_for(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at
