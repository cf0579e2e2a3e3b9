"""Loaders on many ranks: as many batches on each, and the same ones on tensor ranks.

Ranks work together in every step, so one that runs out of batches would leave the others waiting. Tensor ranks of one
data rank share one step, so another batch on one of them would give a gradient of nothing, without an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import sized_len
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_bharat.strategies.placed import PlacedBatches

if TYPE_CHECKING:
    from lightning_bharat.strategies.connection import ConnectedStrategy as _Base
else:
    _Base = object

SAMPLED = 1024  # elements of each tensor of a batch that are compared


class LoaderError(ValueError):
    """Loaders that do not fit together on all ranks; the message says what to write."""


class TogetherLoaders(_Base):
    """Mixed into a strategy: Lightning hands every loader to :meth:`process_dataloader`.

    Attributes:
        agreeing_seconds: in which ranks compared what they had fetched.
    """

    agreeing_seconds = 0.0

    def process_dataloader(self, dataloader: object) -> object:
        """Let ``dataloader`` end on all ranks together, and compare the batches of tensor ranks.

        Raises:
            LoaderError: it is empty on some ranks, and not on others.
        """
        if self.world_size == 1:
            return dataloader
        _seed_workers_alike(dataloader, self.layout.coordinates(self.global_rank)["data"])
        return _together(dataloader, _Agreement(self, self._agreed_length(dataloader)))

    def _agreed_length(self, loader: object) -> int | None:
        """The least of all ranks' lengths; ``None`` if some rank has none."""
        lengths: list[int | None] = [None] * self.world_size
        dist.all_gather_object(lengths, sized_len(loader))
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        if min(known) == 0 < max(known) and not self._allows_empty():
            empty, full = known.index(0), known.index(max(known))
            raise LoaderError(
                f"{type(loader).__name__} has no batch on {self.layout.name(empty)} and {max(known)} on "
                f"{self.layout.name(full)}; give each data rank a share, or take fewer of them (data_parallel_size)"
            )
        if min(known) < max(known):
            self._say_uneven(type(loader).__name__, known)
        return min(known)

    def _allows_empty(self) -> bool:
        module = self.lightning_module
        assert module is not None
        sources = (module, module.trainer.datamodule)  # type: ignore[attr-defined]
        return any(getattr(s, "allow_zero_length_dataloader_with_multiple_devices", False) for s in sources)

    def ends_here(self, has_batch: bool, batches: int, name: str) -> bool:
        """Whether some rank has no further batch. All ranks must call it."""
        flag = torch.tensor(int(has_batch), device=self.root_device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        if flag:
            return False
        everyone: list[int] = [0] * self.world_size
        dist.all_gather_object(everyone, batches + has_batch)
        if min(everyone) < max(everyone):
            self._say_uneven(name, everyone)
        return True

    def _say_uneven(self, name: str, batches: list[int]) -> None:
        least, most = (batches.index(n) for n in (min(batches), max(batches)))
        state = self.lightning_module.trainer.state  # type: ignore[union-attr]
        found = (
            f"{name} has {batches[least]} batches on {self.layout.name(least)} and {batches[most]} or more on "
            f"{self.layout.name(most)}"
        )
        if state.fn == TrainerFn.PREDICTING:
            raise LoaderError(
                f"{found}: predictions would be missing. Give all data ranks as many batches, or predict on one "
                "(data_parallel_size=1)"
            )
        rank_zero_warn(f"{found}: all ranks stop after {batches[least]}, and the other batches are left out")

    def compare_batches(self, batch: Any, number: int, name: str) -> None:
        """Refuse a batch that is another one than on this rank's tensor and context peers. All ranks must call it.

        Raises:
            LoaderError: on all of these ranks.
        """
        sharing = {"tensor": self.tensor_group, "context": self.context_group}
        groups = {axis: group for axis, group in sharing.items() if group is not None}
        mine = _digest(batch) if groups else 0
        pair = torch.tensor([mine, -mine], device=self.root_device)
        for group in groups.values():
            dist.all_reduce(pair, dist.ReduceOp.MAX, group=group)
        if pair[0] == -pair[1]:
            return
        here = self.layout.coordinates(self.global_rank)["data"]
        peers = " × ".join(f"{getattr(self.layout, axis)} {axis}" for axis in groups)
        raise LoaderError(
            f"batch {number} of {name} is not the same on the {peers} ranks of data rank {here}, "
            "which work on one batch together. A sampler or dataset that is divided among ranks must be divided among "
            "data ranks: use trainer.distributed_sampler_kwargs (num_replicas and rank) and not trainer.world_size and "
            "trainer.global_rank; random numbers of its own must be seeded alike"
        )


def _seed_workers_alike(loader: object, data_rank: int) -> None:
    """As Lightning seeds workers after ``seed_everything(workers=True)``, by the data rank instead of the rank."""
    wanted = int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(loader, "worker_init_fn", 0) is None
    if wanted:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=data_rank)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Agreement:
    """What ranks agreed on for a loader; an attribute of it."""

    ranks: TogetherLoaders
    length: int | None


class _Boxed:
    """An iterable whose class can't be extended: an iterator, a range."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inside)

    def __len__(self) -> int:
        return len(self._inside)


def _together(loader: Any, agreement: _Agreement) -> Any:
    """``loader`` itself where its class can be extended, so that it stays what it is for everyone else."""
    if not hasattr(loader, "ranks_agreement"):
        try:
            loader.__class__ = _extended(type(loader))
        except TypeError:
            loader = _Boxed(loader)
            loader.__class__ = _extended(_Boxed)
    loader.ranks_agreement = agreement
    return loader


def _extended(kind: Any) -> type:
    if not hasattr(kind, "__iter__"):
        raise TypeError(f"{kind.__name__} has no __iter__")

    def __iter__(self: Any) -> Iterator[Any]:
        agreed: _Agreement = self.ranks_agreement
        return _Batches(kind.__iter__(self), agreed.ranks, kind.__name__, agreed.length is not None and _certain(self))

    def __len__(self: Any) -> int:
        agreed: _Agreement = self.ranks_agreement
        if agreed.length is None:
            raise TypeError(f"{kind.__name__} has no length on some ranks")
        return min(kind.__len__(self), agreed.length)

    methods = {"__iter__": __iter__, **({"__len__": __len__} if hasattr(kind, "__len__") else {})}
    # Not a mixin, whose layout in memory may be another one.
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _certain(loader: object) -> bool:
    """Whether a loader has as many batches as it says, without doubt: torch's own, with torch's own samplers."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    batches = BatchSampler if type(loader.batch_sampler) is PlacedBatches else type(loader.batch_sampler)
    own = (type(loader.sampler).__module__, batches.__module__)
    return all(module.startswith(("torch.utils.data.", "builtins")) for module in own)


class _Batches(Iterator[Any]):
    """The batches of one iteration over a loader."""

    def __init__(self, batches: Iterator[Any], ranks: TogetherLoaders, name: str, keeps_length: bool) -> None:
        self._batches, self._ranks, self._name, self._keeps_length = batches, ranks, name, keeps_length
        self._count, self._ended = 0, False

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        batch = next(self._batches, _END)
        began = time.perf_counter()
        self._agree(batch)
        self._ranks.agreeing_seconds += time.perf_counter() - began
        if self._ended:
            raise StopIteration
        self._count += 1
        return batch

    def _agree(self, batch: Any) -> None:
        if self._keeps_length:
            self._ended = batch is _END
        else:
            self._ended = self._ranks.ends_here(batch is not _END, self._count, self._name)
        if not self._ended:
            self._ranks.compare_batches(batch, self._count, self._name)


_END = object()


def _digest(batch: Any) -> int:
    """A number that differs for batches of other shapes or other values (of a sample of each tensor)."""
    seen = xxhash.xxh3_64()

    def add(tensor: Tensor) -> Tensor:
        seen.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            some = flat[:: -(-flat.numel() // SAMPLED)].cpu().contiguous()
            seen.update(some.view(torch.uint8).numpy().data)
        return tensor

    apply_to_collection(batch, Tensor, add)
    return seen.intdigest() >> 1  # fits an int64
