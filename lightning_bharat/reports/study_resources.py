"""What a study kept busy, over time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

KINDS = ("trials", "ranks", "cores", "devices")


@dataclass(frozen=True)
class Use:
    """Of what a study ran on. Times are seconds since 1970.

    Attributes:
        times: when a trial began or ended, in order.
        busy: for each of trials, ranks, cores and devices, as far as they were noted: how many were busy from each of
            ``times`` to the next.
        capacity: how many there were: all different cores and devices that a trial had; the most at one time of trials
            and ranks.
    """

    times: tuple[float, ...]
    busy: dict[str, tuple[int, ...]]
    capacity: dict[str, int]

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial], now: float | None = None) -> Use:
        """From the times of trials and their note of ``where`` they ran; one that runs is busy until ``now``."""
        now = time.time() if now is None else now
        spans = [span for trial in trials if (span := _span(trial, now))]
        times = tuple(sorted({t for begin, end, _ in spans for t in (begin, end)}))
        busy, capacity = {}, {}
        for kind in KINDS:
            held = [(begin, end, things) for begin, end, at in spans if (things := _held(kind, at))]
            if not held:
                continue
            counts = _counted([(begin, end, len(things)) for begin, end, things in held], times)
            busy[kind] = counts
            most = max(counts, default=0)
            named = kind in ("cores", "devices")  # else a thing has no name, and is seen only by what is at one time
            capacity[kind] = len({thing for *_, things in held for thing in things}) if named else most
        return cls(times, busy, capacity)

    @property
    def seconds(self) -> float:
        """From the first trial's begin to the last one's end."""
        return self.times[-1] - self.times[0] if self.times else 0.0

    @property
    def nothing_ran(self) -> float:
        """Seconds in it in which no trial ran."""
        return sum(width for width, count in self._pieces("trials") if not count)

    def idle(self, kind: str) -> float | None:
        """Share of 1 of ``capacity`` that stood idle; ``None``: this kind was not noted, or no time went by."""
        whole = self.capacity.get(kind, 0) * self.seconds
        if not whole:
            return None
        return max(0.0, 1 - sum(width * count for width, count in self._pieces(kind)) / whole)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "seconds": self.seconds,
            "seconds_without_trials": self.nothing_ran,
            "capacity": self.capacity,
            "idle_share": {kind: self.idle(kind) for kind in self.busy},
        }

    def _pieces(self, kind: str) -> list[tuple[float, int]]:
        widths = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return list(zip(widths, self.busy.get(kind, ()), strict=False))


def _span(trial: FrozenTrial, now: float) -> tuple[float, float, Mapping[str, Any]] | None:
    """When it began and ended, and where it ran; ``None``: it did not run (an infeasible point, one that waits)."""
    if trial.datetime_start is None or str(trial.user_attrs.get("end", "")).startswith("infeasible"):
        return None
    begin = _seconds(trial.datetime_start)
    if trial.datetime_complete is not None:
        end = _seconds(trial.datetime_complete)
    elif trial.state == TrialState.RUNNING:
        end = now
    else:
        return None
    where = trial.user_attrs.get("where")
    return (begin, end, where if isinstance(where, Mapping) else {}) if end >= begin else None


def _seconds(at: datetime) -> float:
    return at.timestamp()


def _held(kind: str, where: Mapping[str, Any]) -> list[Any]:
    """Things of a kind that a trial held."""
    if kind == "trials":
        return [None]
    if kind == "ranks":
        ranks = where.get("ranks")
        return [None] * ranks if isinstance(ranks, int) and 0 < ranks < 10**6 else []
    things = where.get(kind)
    return [(str(where.get("host")), str(thing)) for thing in things] if isinstance(things, (list, tuple)) else []


def _counted(spans: Sequence[tuple[float, float, int]], times: Sequence[float]) -> tuple[int, ...]:
    changes = dict.fromkeys(times, 0)
    for begin, end, count in spans:
        changes[begin] += count
        changes[end] -= count
    counts, now = [], 0
    for t in times:
        now += changes[t]
        counts.append(now)
    return tuple(counts)
