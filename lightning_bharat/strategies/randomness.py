"""The same random numbers on tensor ranks, which compute one step together, and others in the steps of each data rank.

Where tensor ranks would draw other dropout masks, skip other blocks, or augment a batch in another way, their gradients
would belong to no one model. Data ranks, seeded alike by ``seed_everything``, would drop the same in all of their rows,
or diffuse them by the same noise; outside of steps they keep the numbers that they have, by which samplers may agree.

A run that goes on from a checkpoint draws what it would have drawn: :class:`RandomStates`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from lightning_bharat.checkpoints.told import Told
from lightning_bharat.plan.layout import Layout
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


class RandomStates:
    """The states of a rank's generators in checkpoints, by data ranks: others agree with theirs.

    With as many data ranks as before each finds its own; else all take the first one's.

    A run that goes on begins things again that the other had begun before it saved: iterations over loaders draw
    numbers. So the saved states are set before what follows them in an uninterrupted run, and after what does not.
    """

    KEY = "lightning_bharat_random"

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._begins_late = False

    def with_states(
        self, checkpoint: dict[str, Any], layout: Layout, device: torch.device, in_validation: bool = False
    ) -> dict[str, Any]:
        """Lightning's dict with the states of all data ranks, or the one that they share.

        Args:
            in_validation: states are those of its beginning, for it is run anew.
        """
        begun = self._before_validation if in_validation else None
        own = _plain(begun or _states(device))

        def together(of_ranks: list[Any]) -> list[Any]:
            of_data = [of_ranks[layout.rank(data=i)] for i in range(layout.data)] if len(of_ranks) > 1 else of_ranks
            return of_data if len(set(map(_digest, of_data))) > 1 else of_data[:1]

        return {**checkpoint, self.KEY: Told(own, together)}

    def read(self, checkpoint: Mapping[str, Any], layout: Layout, rank: int, device: torch.device) -> None:
        """Draw on from the states of a checkpoint. The first iteration over the loaders comes next."""
        of_data = checkpoint.get(self.KEY)  # not in a checkpoint of plain Lightning
        if of_data:
            mine = layout.coordinates(rank)["data"] if len(of_data) == layout.data else 0
            self._saved = _from_plain(of_data[mine])
            _set_states(self._saved, device)

    def loaders_begun(self, device: torch.device) -> None:
        """Training loaders have been iterated over, which an uninterrupted run does at the beginning of an epoch."""
        if self._saved is not None:
            self._begun = _states(device)

    def run_starts(self, device: torch.device) -> None:
        """Hooks of the start have drawn numbers, which those of the uninterrupted run did long ago."""
        if self._begun is not None:
            _set_states(self._begun, device)
        self._begun = None

    def epoch_goes_on(self, batches: int, begins_late: bool, device: torch.device) -> None:
        """The next batch follows ``batches`` of this epoch.

        Args:
            begins_late: loaders begin to work when they are asked for it, and draw numbers then.
        """
        if batches == 0:
            self._saved = None
        elif self._saved is not None:
            _set_states(self._saved, device)
            self._begins_late = begins_late

    def validation_begins(self, device: torch.device) -> None:
        """In a run that goes on: by the last batch that it has trained on."""
        if self._saved is not None:
            _set_states(self._saved, device)
        self._saved = None
        self._before_validation = _states(device)

    def batch_starts(self, device: torch.device) -> None:
        """The run has gone on with a batch."""
        if self._saved is not None and self._begins_late:
            _set_states(self._saved, device)
        self._saved, self._begins_late = None, False


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """In types that a checkpoint may hold."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}


def _from_plain(states: dict[str, Any]) -> dict[str, Any]:
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)}


def _digest(states: dict[str, Any]) -> int:
    digest = xxhash.xxh3_64()
    for tensor in (states["torch"], states["numpy"][1], states.get("device", torch.empty(0))):
        digest.update(tensor.numpy().data)
    digest.update(repr((states["numpy"][2:], states["python"])).encode())
    return digest.intdigest()


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
