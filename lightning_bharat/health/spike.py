"""Values that jump above what they were: losses and norms of gradients."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from math import exp, isfinite, log, sqrt

from lightning_bharat.health.robust import MAD_TO_SIGMA, center_of_ordered, spread_around

WINDOW = 64  # values that say what is usual
LEAST = 32  # values before the first look
FLOOR = 8.0  # spreads above the median that are no spike, whatever the tail
MOST = 32.0  # spreads above the median that are a spike, whatever the tail
TAIL = 3.0  # spreads above the median, from where on values say how heavy the tail is
EPISODE = 16  # values in a row that may be spikes; then it is the new level


class SpikeDetector:
    """Says whether a value is a spike: further above the median of the last 64 than their noise explains.

    Distances are measured in robust spreads (1.4826 × the median absolute deviation), so a trend that falls, noise that
    shrinks, and past spikes do not matter. How far is too far follows from the tail that was seen: a generalized Pareto
    distribution is fitted to the distances above three spreads, by moments, and its quantile for ``risk`` is the limit,
    of 8 to 32 spreads (peaks over threshold: Siffer et al., Anomaly Detection in Streams with Extreme Value Theory,
    KDD 2017).

    Args:
        risk: probability that a healthy value is called a spike; 1e-6 is one in a million steps.
    """

    def __init__(self, risk: float = 1e-6) -> None:
        self.risk = risk
        self._usual: deque[float] = deque()
        self._ordered: list[float] = []  # the same, kept in order: to sort them for each value would take longer
        self._excesses: deque[float] = deque(maxlen=512)
        self._seen = 0
        self._in_a_row = 0
        self._limit = 2 * FLOOR  # with few excesses: a tail as heavy as is usual in losses

    def look(self, value: float) -> float | None:
        """Take in a value (finite ones count); returns how many spreads it is above the usual if that is a spike."""
        if not isfinite(value):
            return None
        far = self._distance(value)
        spike = far > self._limit and self._in_a_row < EPISODE
        if spike:
            self._in_a_row += 1
            return far
        if self._in_a_row >= EPISODE:  # the level has changed: what was usual is no more
            self._usual.clear()
            self._ordered.clear()
        elif far > TAIL:
            self._excesses.append(far - TAIL)
            self._limit = self.limit()
        self._in_a_row = 0
        self._take(value)
        self._seen += 1
        return None

    def _take(self, value: float) -> None:
        """Into the window, and the oldest one out of it."""
        if len(self._usual) == WINDOW:
            del self._ordered[bisect_left(self._ordered, self._usual.popleft())]
        self._usual.append(value)
        insort(self._ordered, value)

    def usual(self) -> float:
        """The median of the last values."""
        return center_of_ordered(self._ordered)

    def limit(self) -> float:
        """Spreads above the median from where on a value is a spike."""
        if len(self._excesses) < 20:  # too few for a fit: a tail as heavy as is usual in losses
            return 2 * FLOOR
        count = len(self._excesses)
        mean = sum(self._excesses) / count
        variance = sum((excess - mean) ** 2 for excess in self._excesses) / (count - 1)
        # By moments: shape ξ and scale σ of the generalized Pareto distribution.
        squared = mean * mean / variance if variance > 0 else 1.0
        shape, scale = 0.5 * (1 - squared), 0.5 * mean * (squared + 1)
        shape = min(max(shape, 0.0) + 1 / sqrt(count), 0.6)  # its error's upper side: few values say little of a tail
        rarer = self.risk * self._seen / count
        return min(max(FLOOR, TAIL + scale / shape * (exp(-shape * log(rarer)) - 1)), MOST)

    def _distance(self, value: float) -> float:
        """In spreads above the median; 0 where it is surely no more than ``TAIL``."""
        ordered = self._ordered
        if len(ordered) < LEAST:
            return 0.0
        middle = center_of_ordered(ordered)
        # Above TAIL spreads half of the values are nearer to the median than this; nearly always that is not so.
        near = (value - middle) / (TAIL * MAD_TO_SIGMA)
        if bisect_right(ordered, middle + near) - bisect_left(ordered, middle - near) < len(ordered) // 2:
            return 0.0
        spread = spread_around(middle, ordered)
        return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
