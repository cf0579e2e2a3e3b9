"""Two loops compared step by step: they live in the same ranks and advance in turns, so what slows the machine down
slows both, and the ratio of two neighbouring steps stays.

    >>> fast, slow = [10, 11, 30, 10] * 50, [20, 22, 60, 20] * 50       # the third of four is disturbed, in both
    >>> ratio = paired_ratio(slow, fast)
    >>> ratio.median, ratio.low, ratio.high
    (2.0, 2.0, 2.0)
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb
from statistics import median
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")

# Where the median of a peer's ratio to itself must lie: outside of it something else than the loops was measured.
NULL = (0.97, 1.03)


@dataclass(frozen=True)
class Interval:
    """A median, and the interval that covers the true one with a probability of at least 95 % (each end 2.5 %)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of ``values`` with its exact interval, by order statistics: whatever their distribution, the number of
    values below the true median is binomial (Hahn and Meeker, Statistical Intervals, chapter 5).

    Raises:
        ValueError: too few values for that confidence (6 for 95 %).
    """
    ordered, count = sorted(values), len(values)
    tail, skipped = 0.0, 0
    while (tail := tail + comb(count, skipped) / 2**count) <= (1 - confidence) / 2:
        skipped += 1
    if not skipped:
        raise ValueError(f"{count} values are too few for an interval of {confidence:.0%}")
    return Interval(median(ordered), ordered[skipped - 1], ordered[count - skipped])


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The median of ``ours[i] / theirs[i]``."""
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)])


def is_void(null: Interval) -> bool:
    """Whether a peer differs from itself by more than 3 %: then the other ratios of that run say nothing."""
    return not NULL[0] <= null.median <= NULL[1]


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[tuple[str, ...]]:
    """For each round the order in which loops advance: at random, but each order equally often."""
    draw, every = random.Random(seed), list(permutations(names))
    for i in range(rounds):
        if i % len(every) == 0:
            draw.shuffle(every)
        yield every[i % len(every)]


class Turns(Generic[Batch]):
    """A training loop that advances by one batch when it is told to.

    The loop runs in a thread of its own and waits whenever it asks for a batch. So a step is all that it does from one
    batch to the next, in whatever hooks that is, and the loop need not know that it is measured.

    Args:
        loop: called with the batches, which it takes one by one.
        batches: what it gets: one for the beginning, one for each step, and one that is never given.
        clock: in seconds. The one of the process's own work (``time.process_time``) does not see what else the machine
            is busy with, nor that one rank waits for another.
    """

    def __init__(
        self,
        loop: Callable[[Iterable[Batch]], Any],
        batches: Sequence[Batch],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._batches, self._clock = batches, clock
        self._asked, self._told = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ending = False
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def begin(self) -> None:
        """Let the loop set up whatever it needs and take its first batch, until it asks for its second."""
        self._thread.start()
        self._wait()

    def step(self) -> float:
        """Give it a batch; returns the seconds until it asks for the next one."""
        self._told.release()
        self._wait()
        return self._seconds

    def end(self) -> None:
        """There are no more batches: let the loop return."""
        self._ending = True
        self._told.release()
        self._wait()
        self._thread.join()

    def _wait(self) -> None:
        self._asked.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop: Callable[[Iterable[Batch]], Any]) -> None:
        try:
            loop(_Given(self))
        except BaseException as error:
            self._error = error
        self._asked.release()

    def _give(self) -> Iterator[Batch]:
        # The first batch is free: a strategy that looks at what the module does takes it too, before the loop does.
        yield self._batches[0]
        began = self._clock()
        for batch in self._batches[1:]:
            self._seconds = self._clock() - began
            self._asked.release()
            self._told.acquire()
            if self._ending:
                return
            began = self._clock()
            yield batch


class _Given(Generic[Batch]):
    """Batches with a length, for which Lightning fetches none ahead."""

    def __init__(self, turns: Turns[Batch]) -> None:
        self._turns = turns

    def __len__(self) -> int:
        return len(self._turns._batches)

    def __iter__(self) -> Iterator[Batch]:
        return self._turns._give()


def alternate(
    loops: Mapping[str, Turns], rounds: int, together: Callable[[], object] = lambda: None, seed: int = 0
) -> dict[str, list[float]]:
    """Advance each loop once in each round, in changing order.

    Args:
        together: called before each step; a barrier of all ranks.
        seed: of the orders, the same on all ranks.

    Returns:
        Seconds of each step, by the loop's name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for order in orders(list(loops), rounds, seed):
        for name in order:
            together()
            seconds[name].append(loops[name].step())
    return seconds
