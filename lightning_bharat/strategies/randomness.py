"""The same random numbers on tensor ranks, which compute one step together.

Where they would draw other dropout masks, skip other blocks, or augment a batch in another way, their gradients would
belong to no one model. Data ranks keep the numbers that they have.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def agree_on_random_numbers(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give the first rank's state of torch's, NumPy's and Python's generators to all of ``group``. All must call it."""
    box = [_states(device)]
    dist.broadcast_object_list(box, group_src=0, group=group)
    _set_states(box[0], device)


def _states(device: torch.device) -> dict[str, Any]:
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
