"""A step that is run again draws the numbers that it drew before, and leaves the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

EVERY = 16  # batches from one copy to the next, as long as nobody draws


class AtBatches:
    """Where torch's generators are at the start of each batch.

    To copy that takes as long as all else that is done at the start of a batch. As long as nobody draws it stays what
    it was, so it is copied for one batch in 16, and for each where a copy is not like the one before.

    Args:
        device: whose generator, besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Others than steps may have drawn: copy for each batch, until it is seen that steps do not."""
        self._last: tuple[Any, ...] = ()
        self._moves, self._was_so = True, True

    def taken(self, index: int) -> tuple[Any, ...]:
        """At the start of batch ``index`` of an epoch, which is now."""
        if index == 0:  # loaders draw when an epoch begins
            self.begin()
        if self._moves or index % EVERY == 0:
            before, self._last = self._last, taken(self._device, all_of_them=False)
            if before and index % EVERY == 0:
                moved = not _are_same(before, self._last)
                self._was_so, self._moves = self._moves or not moved, moved
        return self._last

    def are_known(self) -> bool:
        """Whether what was said of the last batches is surely so: not where a module has only just begun to draw."""
        return self._was_so and (self._moves or _are_same(self._last, taken(self._device, all_of_them=False)))


def taken(device: torch.device, all_of_them: bool = True) -> tuple[Any, ...]:
    """Where torch's generators are, and Python's and NumPy's with ``all_of_them``."""
    of_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    others = (random.getstate(), np.random.get_state()) if all_of_them else ()
    return torch.default_generator.get_state(), of_device, *others


def put(states: tuple[Any, ...], device: torch.device) -> None:
    """Put them back."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)
    if len(states) > 2:
        random.setstate(states[2])
        np.random.set_state(states[3])


def _are_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def unmoved(device: torch.device) -> Iterator[None]:
    """What is drawn in here is drawn again after it."""
    before = taken(device)
    try:
        yield
    finally:
        put(before, device)
