"""How long to train from one save to the next: as short as the loss by a failure asks, as long as saving costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any


def best_interval(cost: float, between_failures: float) -> float:
    """Seconds of training between two saves, so that the fewest are lost in all.

    The first-order optimum is √(2 · cost · between_failures) (Young, "A first order approximation to the optimum
    checkpoint interval", CACM 17(9), 1974); this is the higher-order one (Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", FGCS 22(3), 2006, equation 37).

    >>> round(best_interval(0.1, 86400)), round(sqrt(2 * 0.1 * 86400))
    (131, 131)
    >>> best_interval(10, 4)                       # saving takes longer than the machine lives
    4

    Args:
        cost: seconds that a save stops training.
        between_failures: mean seconds from one failure to the next.
    """
    if cost >= 2 * between_failures:
        return between_failures
    ratio = cost / (2 * between_failures)
    return sqrt(2 * cost * between_failures) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost


def between_failures(found: Iterable[Mapping[str, Any]], now: float, default: float) -> float:
    """Mean seconds between the failures of a run, by its events; ``default`` until there is one.

    A failure is a start of training that no end and no asked-for stop came before. Time in which the run was stopped on
    purpose does not count.

    >>> run = [{"time": 0, "kind": "train_start"}, {"time": 50, "kind": "stop"}, {"time": 950, "kind": "train_start"}]
    >>> between_failures(run, 1000, 86400)
    86400
    >>> between_failures([*run, {"time": 1000, "kind": "train_start"}], 1100, 86400)
    200.0
    """
    failures, seconds, last = 0, 0.0, None
    for event in found:
        kind, at = event["kind"], float(event["time"])
        if kind == "train_start":
            failures += last is not None
            seconds += at - last if last is not None else 0.0
            last = at
        elif kind in ("stop", "train_end") and last is not None:
            seconds, last = seconds + at - last, None
    seconds += now - last if last is not None else 0.0
    return seconds / failures if failures else default
