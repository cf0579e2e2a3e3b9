"""The order of all samples in all epochs, and the share of each data rank in it: the same on every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.shared_batches import SharedBatches

ROUNDS = 8


class GlobalOrder:
    """A permutation of ``length`` samples for each epoch, known at any position without being stored.

    Sample number ``k`` of an epoch depends on ``(seed, epoch, k)`` alone: not on the number of ranks, not on what was
    read before, and not on the version of a random generator. Memory and start-up do not grow with ``length``.

    A Feistel network over the next even number of bits, walked along its cycle until it is below ``length`` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self._half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))

    def __call__(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Which samples stand at the positions ``start`` … ``stop - 1`` of an epoch: int64, shape (stop - start,)."""
        return self.at(epoch, np.arange(start, stop))

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Which samples stand at these positions: int64, of the same shape (n,)."""
        places = positions.astype(np.uint64)
        if not self.shuffle:
            return places.astype(np.int64)
        keys = _round_keys(self.seed, epoch)
        found = self._scramble(places, keys)
        while (outside := found >= np.uint64(self.length)).any():
            found[outside] = self._scramble(found[outside], keys)
        return found.astype(np.int64)

    def _scramble(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = values >> self._half_bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half_bits) | right


@lru_cache(maxsize=64)  # a file has keys of its own
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    # SeedSequence's algorithm is fixed by NumPy's compatibility policy; its generators' streams are not.
    return np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input moves every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Steps:
    """How the positions from ``start`` to ``length`` of an epoch are cut into steps and shared by data ranks.

    A step takes ``batch_size`` × ``ranks`` positions; each rank has its contiguous part of them, so that the ranks'
    batches one after another are the batch that a single process with the whole batch size gets. Every rank has the
    same number of steps, and no sample is repeated. The rest at the end of an epoch is left out (``drop_last=True``) or
    is a last, smaller step, cut as evenly as can be. A rest of fewer samples than ranks takes samples of the step
    before, so that no rank stands without one; with ``batch_size=1``, where that has none to give, it joins that step.

    Raises:
        DataError: there is no step for every rank.
    """

    length: int
    batch_size: int
    ranks: int = 1
    drop_last: bool = True
    start: int = 0

    def __post_init__(self) -> None:
        left = self.length - self.start
        if left and not self.drop_last and left < self.ranks:
            raise DataError(
                f"{left} samples are left of this epoch for {self.ranks} data ranks, and each needs one; "
                f"run on at most {left} data ranks, or write drop_last=True"
            )

    @property
    def global_batch(self) -> int:
        """Samples of one step over all data ranks."""
        return self.batch_size * self.ranks

    def __len__(self) -> int:
        full, rest = divmod(self.length - self.start, self.global_batch)
        if self.drop_last or rest == 0 or (rest < self.ranks and self.batch_size == 1):
            return full
        return full + 1

    def end(self, step: int) -> int:
        """Position behind the step number ``step``; ``start`` for step -1."""
        end = self.start + (step + 1) * self.global_batch
        if self.drop_last:
            return end
        steps = len(self)
        if step == steps - 2:
            return min(end, self.length - self.ranks)
        return self.length if step == steps - 1 else end

    def share(self, step: int, rank: int) -> tuple[int, int]:
        """Positions ``[begin, end)`` of data rank ``rank`` in a step."""
        begin, end = self.end(step - 1), self.end(step)
        even, more = divmod(end - begin, self.ranks)
        begin += rank * even + min(rank, more)
        return begin, begin + even + (rank < more)


class OrderedBatches(SharedBatches):
    """By rank: a step is a piece of the shuffled order, and each data rank has its part of it.

    Args:
        length: number of samples.
        batch_size: samples a step of one data rank.
        num_replicas: number of data ranks.
        rank: which of them this is.
        seed: of the order.
        shuffle: another order in each epoch, or the samples as they are stored.
        drop_last: see :class:`Steps`.

    Raises:
        DataError: fewer samples than one step takes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self.order = GlobalOrder(length, seed, shuffle)
        super().__init__(length, batch_size, num_replicas, rank, drop_last)

    def resize(self, batch_size: int) -> None:
        super().resize(batch_size)
        refuse_too_few(self._steps(0))

    def _steps(self, start: int) -> Steps:
        return Steps(self.length, self.batch_size, self.num_replicas, self.drop_last, start)

    def left(self) -> int:
        return len(self._steps(self.position))

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        position = self._steps(self.position).end(done - 1)
        of_order = {"samples": self.length, "seed": self.order.seed, "shuffle": self.order.shuffle}
        return {"epoch": self.epoch, "position": position, **of_order, "sharding": "rank"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps(state["position"])
        self.go_to(state["epoch"], state["position"])

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every data rank."""
        return len(self._steps(0))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, steps = self.epoch, self._steps(self.position)
        for step in range(len(steps)):
            yield self.order(epoch, *steps.share(step, self.rank)).tolist()


def refuse_too_few(steps: Steps) -> None:
    """Raise where an epoch has no step.

    Raises:
        DataError: says what to write.
    """
    if len(steps) == 0:
        raise DataError(
            f"{steps.length} samples are fewer than one step of batch_size={steps.batch_size} on {steps.ranks} data "
            f"ranks = {steps.global_batch}; write batch_size={max(1, steps.length // steps.ranks)} or less, "
            "a shorter sequence_length, or give more text"
        )
