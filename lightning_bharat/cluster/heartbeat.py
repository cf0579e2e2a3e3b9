"""Signs of life of a rank: a few numbers in a file that the rank and its launcher both map into memory.

A thread of the rank beats; whoever knows how far the training is (a strategy, a callback, a script) calls
:func:`progress`. Outside of ``bharat launch`` that does nothing and costs nothing. No store and no process group is
needed, so the launcher can read it whatever hangs.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PHASES = ("script", "setup", "step", "validation", "save", "end")
BEAT = 0.25  # seconds between two beats
NO_STEP = -1
_PULSE = struct.Struct("=ddqqqd")  # as in Pulse


@dataclass(frozen=True)
class Pulse:
    """What a rank has last said of itself.

    Attributes:
        beat: when it last gave a sign of life, in seconds of the host's monotonic clock; 0: never.
        progress: when it last got on.
        step: optimizer steps that it has done; -1: not known.
        phase: what it is doing, one of ``PHASES``; only of ``"script"`` it is not known how long it may take.
        began: the step from which it went on; -1: not known.
        first: when it had done the step after that; 0: not yet.
    """

    beat: float = 0.0
    progress: float = 0.0
    step: int = NO_STEP
    phase: str = "script"
    began: int = NO_STEP
    first: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Pulse:
        """From a rank's file; a rank that has not begun yet has given no sign."""
        try:
            beat, progress, step, phase, began, first = _PULSE.unpack(path.read_bytes())
        except (OSError, struct.error):
            return cls()
        return cls(beat, progress, step, PHASES[phase] if 0 <= phase < len(PHASES) else "script", began, first)


class Heart:
    """The rank's side of the file.

    Args:
        path: of the file, which is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(bytes(_PULSE.size))
        descriptor = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(descriptor, _PULSE.size)
        os.close(descriptor)
        self._step = self._began = NO_STEP
        self._first = 0.0
        self.progress("script")

    def start(self) -> None:
        """Beat in a thread of its own, as long as the process runs."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def progress(self, phase: str, step: int | None = None) -> None:
        """Write that the rank gets on."""
        now = time.monotonic()
        if step is not None:
            if self._began == NO_STEP:
                self._began = step
            elif not self._first and step > self._began:
                self._first = now
            self._step = step
        _PULSE.pack_into(self._map, 0, now, now, self._step, PHASES.index(phase), self._began, self._first)

    def tell_run(self, folder: Path) -> None:
        """Write where the run's events and checkpoints are."""
        run_of(self._path).write_text(str(folder))

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            struct.pack_into("=d", self._map, 0, time.monotonic())


def run_of(path: Path) -> Path:
    """The file in which the rank of a heartbeat file names the run's folder."""
    return path.with_suffix(".run")


_heart: Heart | None = None


def begin(path: Path) -> None:
    """Beat from now on; called once in a rank that ``bharat launch`` has started."""
    global _heart
    _heart = Heart(path)
    _heart.start()


def is_watched() -> bool:
    """Whether a launcher looks at what this process says."""
    return _heart is not None


def progress(phase: str, step: int | None = None) -> None:
    """Say that this rank gets on.

    Args:
        phase: what it does from now on: ``"setup"``, ``"step"``, ``"validation"``, ``"save"``, ``"end"``, or
            ``"script"``, which may take as long as it likes.
        step: optimizer steps that are done.
    """
    if _heart is not None:
        _heart.progress(phase, step)


def tell_run(folder: str | os.PathLike[str]) -> None:
    """Say where the run's events and checkpoints are, so that the launcher writes its events there, too."""
    if _heart is not None:
        _heart.tell_run(Path(folder).absolute())
