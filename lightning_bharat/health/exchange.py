"""One small sum over all ranks for each optimizer step, by which all of them decide the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Step:
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

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return isfinite(self.loss) and isfinite(self.norm)


def exchange(loss: Tensor, squared: Tensor, reports: int, bad_batch: Tensor | bool) -> Step:
    """Sum over all ranks. All of them must call it; one transfer from the device.

    Args:
        loss: this rank's.
        squared: its share of the gradients' squared norm; on the device of collectives.
        reports: what it has to tell.
        bad_batch: whether its batch is one, which may not be known on the host yet.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    device = squared.device
    mine = torch.zeros(4, dtype=torch.float64, device=device)
    mine[0], mine[1] = loss, squared
    if reports:
        mine[2] = reports
    if bad_batch is not False:
        mine[3] = bad_batch
    if ranks > 1:
        dist.all_reduce(mine)
    total, square, told, bad = mine.tolist()
    return Step(total / ranks, sqrt(square) if square >= 0 else square, _count(told), _count(bad))


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


def _count(number: float) -> int:
    return round(number) if isfinite(number) else 0
