"""torch's own loaders with a place in their order: a run that goes on in the middle of an epoch reads what is left.

Lightning saves the state of loaders that have one, and loads it. A ``DataLoader`` has none, though its order is known
where its sampler is one of torch's that depend on the epoch alone: so the samples that were trained on say where it is,
on any number of data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_bharat.strategies.worker_seeds import SeededSamples

_ORDERED = (DistributedSampler, SequentialSampler)


def is_resizable(loader: object) -> bool:
    """Whether ``loader`` is a ``DataLoader`` whose batches torch's own sampler makes, of so many samples as it says."""
    return isinstance(loader, DataLoader) and type(loader.batch_sampler) in (BatchSampler, PlacedBatches)


def has_known_order(loader: Any) -> bool:
    """Whether the samples of an epoch come in an order that depends on its number alone."""
    return (
        is_resizable(loader)
        and type(loader.sampler) in _ORDERED
        and not isinstance(loader.dataset, IterableDataset)
        and (hasattr(loader, "placed_ranks") or not hasattr(loader, "state_dict"))
    )


class PlacedBatches(BatchSampler):
    """torch's own, which can begin in the middle of an epoch."""

    _next: tuple[int | None, int] | None = None
    in_workers = False

    def go_to(self, epoch: int | None, batches: int) -> None:
        """Begin the next iteration behind so many batches of that epoch."""
        self._next = epoch, batches

    def forget_place(self) -> None:
        """Begin the next iteration with the first batch."""
        self._next = None

    def __iter__(self) -> Iterator[list[int]]:
        place, self._next = self._next, None
        epoch, skipped = place or (None, 0)
        if epoch is not None:  # Lightning says it later than a loader with workers wants to know
            self.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        batches: Iterator[list[int]] = islice(super().__iter__(), skipped, None)
        if self.in_workers:
            seed, number = torch.initial_seed(), getattr(self.sampler, "epoch", 0)
            batches = (SeededSamples(batch, seed, number) for batch in batches)
        yield from batches


def _state_dict(loader: Any) -> dict[str, Any]:
    """How many samples of the epoch all data ranks have trained on: the same on all ranks."""
    length, done = len(loader), loader.placed_finished()
    batches = done if done <= length else done % length  # shorter than the epoch, it begins again and again
    samples = batches * loader.batch_size * loader.placed_ranks
    return {"epoch": getattr(loader.sampler, "epoch", None), "samples": samples}


def _load_state_dict(loader: Any, state: dict[str, Any]) -> None:
    loader.batch_sampler.go_to(state["epoch"], state["samples"] // (loader.batch_size * loader.placed_ranks))


def place(loader: Any, data_ranks: int, finished: Callable[[], int]) -> None:
    """Let ``loader``, whose order is known, have a state.

    Args:
        data_ranks: that share the samples.
        finished: how many batches of the epoch the training loop has finished.
    """
    placed = hasattr(loader, "placed_ranks")
    loader.placed_ranks, loader.placed_finished = data_ranks, finished
    if placed:
        return
    kind, methods = type(loader), {"state_dict": _state_dict, "load_state_dict": _load_state_dict}
    # Not a mixin, whose layout in memory may be another one.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    loader.__class__ = type(kind.__name__, (kind,), {**methods, **names})
    batches = loader.batch_sampler
    # A DataLoader refuses to be changed.
    loader.__dict__["batch_sampler"] = PlacedBatches(batches.sampler, batches.batch_size, batches.drop_last)
    loader.batch_sampler.in_workers = loader.num_workers > 0


def go_to(loader: Any, epoch: int, batches: int) -> None:
    """Let the next iteration over ``loader``, whose order is known, begin behind so many batches of that epoch. It gets
    no state by this."""
    own = loader.batch_sampler
    if type(own) is not PlacedBatches:
        loader.__dict__["batch_sampler"] = own = PlacedBatches(own.sampler, own.batch_size, own.drop_last)
    own.go_to(epoch, batches)


def begin_epoch(loader: Any, epoch: int) -> None:
    """Let ``loader`` begin with the order of that epoch: Lightning tells samplers when workers have read their first
    batches, and litdata's loader nothing where it goes on at an epoch's end."""
    if type(getattr(loader, "sampler", None)) is DistributedSampler:
        loader.sampler.set_epoch(epoch)
    elif is_streaming(loader):
        loader.current_epoch = epoch


def end_epoch(loader: Any) -> None:
    """Forget a place in the epoch that has ended.

    litdata's loader takes the rest of an epoch for the next one, after a resume, until it was asked for a batch more
    than there are, which Lightning does not do.
    """
    if is_streaming(loader):
        loader.restore = False
    elif type(batches := getattr(loader, "batch_sampler", None)) is PlacedBatches:
        batches.forget_place()


def is_streaming(loader: object) -> bool:
    """Whether ``loader`` is litdata's."""
    return isinstance(loader, DataLoader) and any(
        kind.__name__ == "StreamingDataLoader" for kind in type(loader).__mro__
    )


def resize(loader: Any, batch_size: int) -> None:
    """Let a ``DataLoader`` that :func:`is_resizable` make batches of another size."""
    loader.__dict__["batch_size"] = loader.batch_sampler.batch_size = batch_size


def share_anew(loader: Any, num_replicas: int, rank: int) -> None:
    """Divide the samples among other data ranks, where the person's own ``DistributedSampler`` was made for those of
    before."""
    sampler = loader.sampler
    epoch, how = sampler.epoch, (sampler.shuffle, sampler.seed, sampler.drop_last)
    DistributedSampler.__init__(sampler, sampler.dataset, num_replicas, rank, *how)
    sampler.epoch = epoch
