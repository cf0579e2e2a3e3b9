"""The same random numbers on tensor ranks, which compute one step together, and others in the steps of each data rank.

Where tensor ranks would draw other dropout masks, skip other blocks, or augment a batch in another way, their gradients
would belong to no one model. Data ranks, seeded alike by ``seed_everything``, would drop the same in all of their rows,
or diffuse them by the same noise; outside of steps they keep the numbers that they have, by which samplers may agree.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_bharat.plan.streams import TensorStream


def agree_on_random_numbers(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give the first rank's state of torch's, NumPy's and Python's generators to all of ``group``. All must call it."""
    box = [_states(device)]
    dist.broadcast_object_list(box, group_src=0, group=group)
    _set_states(box[0], device)


@contextmanager
def apart(rank: int, device: torch.device) -> Iterator[None]:
    """Draw torch's numbers from a stream of data rank ``rank``, begun by one number of the common one."""
    streams = {where: TensorStream(rank) for where in (torch.device("cpu"), device)}
    for where, stream in streams.items():
        stream.enter(where)
    try:
        yield
    finally:
        for stream in streams.values():
            stream.leave()


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
