"""Memory that only grows."""

from __future__ import annotations

import os
from statistics import median

import torch

from lightning_bharat.health.robust import slope

SAMPLES = 10  # of which the least counts: what a step holds for a while is no leak
WINDOWS = 8
LEAST_GROWTH = 0.01  # of what is held, over all windows
LEAST_BYTES = 16 * 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


class LeakDetector:
    """Looks at the least use of each of the last eight windows of ten samples: a leak lifts each of them, by about the
    same, while caches fill up slower and slower and loads go up and down.

    The slope is Theil and Sen's (:func:`~lightning_bharat.health.robust.slope`). It is a leak where every window is
    above the one before by a third of the median growth at least, the last three have grown by 0.8 of the first three,
    and all of them together by 1 % and 16 MiB. (A cache that takes many minutes to fill up looks the same at first.)

    Found within 90 samples from where it begins, and said again only when the use has grown by half.
    """

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._lows: list[float] = []
        self._said = 0.0

    def look(self, used: float) -> float | None:
        """Take in the bytes that are used; returns the bytes by which they grow with each sample if that is a leak."""
        self._samples.append(used)
        if len(self._samples) < SAMPLES:
            return None
        self._lows = [*self._lows[-(WINDOWS - 1) :], min(self._samples)]
        self._samples = []
        if len(self._lows) < WINDOWS or self._lows[-1] < 1.5 * self._said:
            return None
        steps = [after - before for before, after in zip(self._lows, self._lows[1:], strict=False)]
        each = slope(self._lows)
        grown = each * (WINDOWS - 1)
        if grown < max(LEAST_GROWTH * self._lows[0], LEAST_BYTES):
            return None
        if min(steps) <= max(median(steps) / 3, 0) or sum(steps[-3:]) < 0.8 * sum(steps[:3]):
            return None
        self._said = self._lows[-1]
        return each / SAMPLES


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(256).split()[1]) * _PAGE


def on_device(device: torch.device) -> int:
    """Bytes of tensors on ``device``, which is not the CPU."""
    return torch.get_device_module(device).memory_allocated(device)
