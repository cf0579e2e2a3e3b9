"""What ranks exchange in a dry run: counted, while one rank plays all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_bharat.plan.exchange import OnePeer


@dataclass(frozen=True)
class Moved:
    """What ranks exchange.

    Attributes:
        summed, gathered: bytes of the whole results of all-reduces, and of all-gathers and reduce-scatters.
        times: how many there are; an all-reduce is two, a reduce-scatter and an all-gather.
        swapped: bytes that a rank has for all-to-alls, of which each rank gets a part and one stays.
        swaps: how many there are.
    """

    summed: float = 0
    gathered: float = 0
    times: float = 0
    swapped: float = 0
    swaps: float = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.summed + other.summed,
            self.gathered + other.gathered,
            self.times + other.times,
            self.swapped + other.swapped,
            self.swaps + other.swaps,
        )

    def __mul__(self, factor: float) -> Moved:
        return Moved(*(factor * value for value in vars(self).values()))

    def __sub__(self, other: Moved) -> Moved:
        return self + other * -1


NOTHING = Moved()


class CountingPeers(OnePeer):
    """The first of ``size`` tensor or context ranks, alone: exchanges have their shapes and no values, and are counted.

    Attributes:
        moved: so far.
    """

    def __init__(self, size: int) -> None:
        self.size, self.moved = size, NOTHING

    def all_reduce(self, x: Tensor) -> Tensor:
        self.moved += Moved(summed=x.numel() * x.itemsize, times=2)
        return x.clone()

    all_max = all_reduce

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.moved += Moved(gathered=x.numel() * x.itemsize * self.size, times=1)
        return torch.cat([x] * self.size, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        self.moved += Moved(gathered=x.numel() * x.itemsize, times=1)
        return x.chunk(self.size, dim)[0].clone()

    def all_to_all(self, x: Tensor) -> Tensor:
        self.moved += Moved(swapped=x.numel() * x.itemsize, swaps=1)
        return x.clone()


class CountingRoutes:
    """The first of ``size`` expert ranks, alone; as :class:`CountingPeers`."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.moved = 0, size, NOTHING

    def depart(self, x: Tensor, received: list[int], sent: list[int]) -> Callable[[], Tensor]:
        self.moved += Moved(swapped=x.numel() * x.itemsize, swaps=1)
        return lambda: x.new_empty((sum(received), *x.shape[1:]))

    def __deepcopy__(self, memo: dict[int, Any]) -> CountingRoutes:
        return self  # a copied module exchanges with the same ranks


@dataclass(frozen=True)
class Counters:
    """Who counts what a module's ranks exchange, by the cut in which they do."""

    tensor: CountingPeers = field(default_factory=lambda: CountingPeers(1))
    context: CountingPeers = field(default_factory=lambda: CountingPeers(1))
    expert: CountingRoutes = field(default_factory=lambda: CountingRoutes(1))

    def moved(self) -> dict[str, Moved]:
        """So far."""
        return {cut.name: getattr(self, cut.name).moved for cut in fields(self)}
