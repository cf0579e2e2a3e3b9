"""A step that is run again draws the numbers that it drew before, and leaves the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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


@contextmanager
def unmoved(device: torch.device) -> Iterator[None]:
    """What is drawn in here is drawn again after it."""
    before = taken(device)
    try:
        yield
    finally:
        put(before, device)
