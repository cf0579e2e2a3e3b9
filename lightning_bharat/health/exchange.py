"""One small sum over all ranks for each optimizer step, by which all of them decide the same."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Step(NamedTuple):
    """What all ranks know of a step before the optimizer makes it.

    Attributes:
        loss: mean over ranks and accumulated batches.
        norm: of the gradients, over all ranks.
        reports: how many things ranks have to tell.
        bad_batches: how many ranks have one.
    """

    loss: float
    norm: float
    reports: int
    bad_batches: int


class Exchange:
    """The sum over all ranks.

    Args:
        device: of collectives.
    """

    def __init__(self, device: torch.device) -> None:
        # On the CPU they are numbers of Python's, which go in and out of an array, without operators.
        self._array = array("d", [0.0] * 4) if device.type == "cpu" else None
        self._mine = (
            torch.zeros(4, dtype=torch.float64, device=device)
            if self._array is None
            else torch.frombuffer(self._array, dtype=torch.float64)
        )
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1

    def step(self, loss: Tensor | float, squared: Tensor | float, reports: int, bad_batch: Tensor | bool) -> Step:
        """All ranks must call it; one transfer from the device.

        Args:
            loss: this rank's.
            squared: its share of the gradients' squared norm.
            reports: what it has to tell.
            bad_batch: whether its batch is one, which may not be known on the host yet.
        """
        if self._ranks == 1 and self._array is not None:
            return Step(loss, sqrt(squared), reports, bad_batch)  # type: ignore[arg-type]
        into: Any = self._mine if self._array is None else self._array
        into[0], into[1], into[2], into[3] = loss, squared, reports, bad_batch
        if self._ranks > 1:
            dist.all_reduce(self._mine)  # not the group's own method: by torch's frame it is seen that a rank waits
        total, square, told, bad = into.tolist()
        return Step(total / self._ranks, sqrt(square), int(told), int(bad))


def gathered(mine: Any) -> list[Any]:
    """``mine`` of all ranks, in their order. All of them must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def flat(of_ranks: Sequence[list[Any]]) -> list[Any]:
    """One list of all."""
    return [entry for of_rank in of_ranks for entry in of_rank]
