"""Ranks that work longer than the others on the same step.

In a step all ranks end together, since they wait for each other; so times of steps name nobody. What tells them apart
is waiting: the slow rank waits least. A thread looks a few times a second at what the main thread does, and counts a
look as waiting where the kernel says that the thread sleeps while Python is inside of torch, as in a collective of
gloo; sleeps in a person's code, in a loader, or for a disk, count as work, as does a thread that gets no processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from lightning_bharat.health import stacks
from lightning_bharat.health.finding import Finding
from lightning_bharat.health.proc_file import ProcFile
from lightning_bharat.health.progress import Progress

RATIO = 1.4  # of the median of the other ranks
WINDOWS = 3  # in a row


class WorkSampler:
    """How long this rank works on a step.

    Args:
        progress: of its main thread.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._state = ProcFile(f"/proc/self/task/{progress.native}/stat")
        self._looks = self._waiting = 0

    def look(self) -> None:
        """Look once at what the main thread does."""
        self._looks += 1
        if self._sleeps() and stacks.is_in_torch(self._progress.thread):
            self._waiting += 1

    def _sleeps(self) -> bool:
        try:
            return self._state.read().rpartition(b")")[2].split()[0] == b"S"
        except (OSError, IndexError):
            return False

    def share(self) -> float:
        """Of the time since the last call: the share in which it worked."""
        looks, waiting, self._looks, self._waiting = self._looks, self._waiting, 0, 0
        return 1 - waiting / looks if looks else 1.0


class StragglerDetector:
    """Compares the work of all ranks in windows of some seconds.

    A straggler works 1.4 times as long as the median of the other ranks, in three windows in a row.

    Args:
        name: a rank's name in messages.
    """

    def __init__(self, name: Callable[[int], str] = "rank {}".format) -> None:
        self._name = name
        self._in_a_row: dict[int, int] = {}

    def look(self, work: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
        """Take in a window.

        Args:
            work: seconds that each rank worked on a step.
            hosts: by rank.
        """
        found = []
        for rank, own in work.items():
            others = [seconds for other, seconds in work.items() if other != rank]
            usual = median(others) if others else own
            slow = own > RATIO * usual
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow else 0
            if self._in_a_row[rank] == WINDOWS:
                host = hosts.get(rank, "?")
                words = (
                    f"{self._name(rank)} on {host} works {1e3 * own:.1f} ms on a step, {own / max(usual, 1e-9):.1f} "
                    f"times as long as the median of the others ({1e3 * usual:.1f} ms), which wait for it"
                )
                found.append(Finding("straggler", words, rank, host, {"ratio": own / max(usual, 1e-9)}))
        return found
