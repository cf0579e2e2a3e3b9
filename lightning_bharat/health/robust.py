"""Statistics that a few wild values do not move."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from statistics import median

MAD_TO_SIGMA = 1.4826  # of a normal distribution


def center_and_spread(values: Collection[float]) -> tuple[float, float]:
    """The median, and the median distance from it in units of a normal distribution's standard deviation (Hampel,
    1974). Half of the values may be anything."""
    middle = center(values)
    return middle, MAD_TO_SIGMA * center([abs(value - middle) for value in values])


def center(values: Iterable[float]) -> float:
    """The median, faster than by ``statistics.median``."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def slope(values: Sequence[float]) -> float:
    """The median of all slopes between two values, per place (Theil, 1950; Sen, 1968): up to 29 % of them may be wild.

    >>> slope([0, 1, 2, 90, 4, 5])
    1.0
    """
    return median((values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2))
