"""Batches of sample numbers for one data rank: what loaders ask of every way to share samples."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler

from lightning_bharat.data.errors import DataError


class SharedBatches(Sampler[list[int]]):
    """What every way to share samples has: batches of sample numbers for one data rank, from any place of any epoch on.

    The position is counted in samples of the *global* order, so it means the same on every number of data ranks. It
    moves only by :meth:`go_to` and :meth:`load_state_dict`: worker processes fetch ahead, and what was fetched was not
    yet trained on. Every data rank has the same number of steps, which is the same in every epoch.

    Attributes:
        batch_size: of a data rank in a step, in ``unit``.
        unit: what ``batch_size`` counts.
    """

    unit = "rows"

    def __init__(self, length: int, batch_size: int, num_replicas: int, rank: int, drop_last: bool) -> None:
        if not 0 <= rank < num_replicas:
            raise DataError(f"rank={rank} is not one of the {num_replicas} data ranks 0 … {num_replicas - 1}")
        self.length = length
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        self.resize(batch_size)

    def resize(self, batch_size: int) -> None:
        """Go on with batches of another size, from the same position.

        Raises:
            DataError: it is no size, or there is no step of it.
        """
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: write a whole number from 1 up")
        self.batch_size = batch_size

    def go_to(self, epoch: int, position: int = 0) -> None:
        """Where the next iteration begins."""
        self.epoch, self.position = epoch, position

    def left(self) -> int:
        """Steps from the position to the end of the epoch, the same on every data rank."""
        raise NotImplementedError

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        """The place behind ``done`` steps from the position on, and what it belongs to: plain numbers and words."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that batches of any number of data ranks have said.

        Raises:
            DataError: what is left of its epoch cannot be shared by these.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        raise NotImplementedError
