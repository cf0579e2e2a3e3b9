"""Values that jump above what they were: losses and norms of gradients."""

from __future__ import annotations

from collections import deque
from math import exp, inf, isfinite, log, sqrt

from lightning_bharat.health.robust import center, center_and_spread

WINDOW = 64  # values that say what is usual
LEAST = 32  # values before the first look
RENEWED = 8  # values from one look at the window to the next, as long as none is further than NEAR
NEAR = 1.5  # spreads above the median that are surely nothing, also of a window that is some values older
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

    Median and spread are computed for each value that is 1.5 spreads above, and else for every eighth.

    Args:
        risk: probability that a healthy value is called a spike; 1e-6 is one in a million steps.
    """

    def __init__(self, risk: float = 1e-6) -> None:
        self.risk = risk
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._excesses: deque[float] = deque(maxlen=512)
        self._seen = 0
        self._in_a_row = 0
        self._limit = 2 * FLOOR  # with few excesses: a tail as heavy as is usual in losses
        self._near, self._until_look = inf, LEAST

    def look(self, value: float) -> float | None:
        """Take in a value (finite ones count); returns how many spreads it is above the usual if that is a spike."""
        # Nearly all values are done with here: to order the window for each of them would take ten times as long.
        if not (self._until_look and -inf < value < self._near):
            if not isfinite(value):
                return None
            far = self._distance(value)
            if far > self._limit and self._in_a_row < EPISODE:
                self._in_a_row += 1
                self._near = -inf  # whatever comes next is looked at
                return far
            self._no_spike(far)
        self._until_look -= 1
        self._usual.append(value)
        self._seen += 1
        return None

    def _distance(self, value: float) -> float:
        """In spreads above the median of the window as it is now."""
        middle, spread = center_and_spread(self._usual)
        spread = max(spread, 1e-3 * abs(middle), 1e-12)
        self._near, self._until_look = middle + NEAR * spread, RENEWED
        return (value - middle) / spread

    def _no_spike(self, far: float) -> None:
        if self._in_a_row >= EPISODE:  # the level has changed: what was usual is no more
            self._usual.clear()
            self._near, self._until_look = inf, LEAST
        elif far > TAIL:
            self._excesses.append(far - TAIL)
            self._limit = self.limit()
        self._in_a_row = 0

    def usual(self) -> float:
        """The median of the last values."""
        return center(self._usual)

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
