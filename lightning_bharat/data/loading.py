"""How many workers a loader needs, from how long training waits for it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

import psutil

LEAST_GAIN = 0.02  # of a step's time, that a change must bring to be kept
TRIES = 2
MOST_AHEAD = 8  # batches that a worker reads ahead
MARGIN = 1.1  # more work than was measured that workers must do


@dataclass(frozen=True)
class Setting:
    """Of a ``DataLoader``: ``prefetch_factor`` is ``None`` without workers, as there."""

    num_workers: int
    prefetch_factor: int | None

    def __str__(self) -> str:
        ahead = "" if self.prefetch_factor is None else f", prefetch_factor={self.prefetch_factor}"
        return f"num_workers={self.num_workers}{ahead}"


@dataclass(frozen=True)
class Waited:
    """What was measured with a setting, on the slowest rank.

    Attributes:
        wait: seconds of a step in which training waited for its batch.
        step: seconds of a step, with these.
    """

    setting: Setting
    wait: float
    step: float

    @property
    def share(self) -> float:
        """Of the wait, in the time of a step."""
        return self.wait / self.step if self.step else 0.0


class Search:
    """The setting with which a step takes least.

    Workers that can't keep up are busy all the time, so ``n`` of them make a batch in ``n`` steps' time each, and
    that time divided by the step's own work is how many are needed (Little's law; the model of tf.data's autotuning,
    Murray et al., "tf.data: A Machine Learning Data Processing Framework", 2021). Where there are as many as there may
    be, batches that take unequally long are evened out by reading further ahead. What does not make a step shorter is
    taken back, and tried once more: other work of the machine may have been in the way.

    Args:
        limit: a smaller share of waiting is let be.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.best: Waited | None = None
        self._tried: str = ""
        self._failed: Counter[str] = Counter()

    def look(self, now: Waited, most: int) -> tuple[Setting, str]:
        """What to go on with, and what a change has brought, in words ("" where nothing was changed before).

        Args:
            now: what was measured since the last call.
            most: workers that there may be.
        """
        words, before = "", self.best
        if before is None or not self._tried:
            self.best = now
        elif now.step <= (1 - LEAST_GAIN) * before.step:
            self.best = now
            words = f"{now.setting} instead of {before.setting}: {_change(before, now)}"
        else:
            self._failed[self._tried] += 1
            self._tried = ""
            return before.setting, f"{before.setting} again, {now.setting} was no gain: {_change(before, now)}"
        return self._next(self.best, most), words

    def _next(self, best: Waited, most: int) -> Setting:
        self._tried = ""
        if best.share <= self._limit:
            return best.setting
        setting = best.setting
        workers = min(wanted_workers(best), most)
        if workers > setting.num_workers and self._failed["num_workers"] < TRIES:
            self._tried = "num_workers"
            return Setting(workers, setting.prefetch_factor or 2)
        ahead = 2 * (setting.prefetch_factor or MOST_AHEAD)
        if ahead <= MOST_AHEAD and self._failed["prefetch_factor"] < TRIES:
            self._tried = "prefetch_factor"
            return replace(setting, prefetch_factor=ahead)
        return setting


def wanted_workers(now: Waited) -> int:
    """That make a batch in the time of a step's own work."""
    own = max(now.step - now.wait, 1e-6)
    workers = now.setting.num_workers
    of_a_batch = workers * now.step if workers else now.wait
    return ceil(MARGIN * of_a_batch / own)


def _change(before: Waited, now: Waited) -> str:
    return (
        f"a step takes {1e3 * now.step:.3g} ms instead of {1e3 * before.step:.3g}, and {now.share:.0%} of it waits for "
        f"input instead of {before.share:.0%}"
    )


def most_workers(ranks: int, batch_bytes: int) -> int:
    """How many workers each of ``ranks`` on this host may have: its share of the cores that the process may run on, and
    of half of the memory that is free. A worker is forked, and may come to hold what this process holds; it reads two
    batches ahead. At least one."""
    cores = len(os.sched_getaffinity(0)) // ranks
    each = psutil.Process().memory_info().rss + 2 * batch_bytes
    return max(1, min(cores, int(psutil.virtual_memory().available / 2 / ranks / each)))
