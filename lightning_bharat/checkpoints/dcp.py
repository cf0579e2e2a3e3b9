"""Shares out of safetensors files, planned by torch.distributed.checkpoint (DCP).

DCP finds which stored rectangles a rank needs. Ours are the two ends: a planner that knows :class:`Share`, and storage
in safetensors with an index in JSON in place of pickles. Writing has :mod:`~lightning_bharat.checkpoints.planned`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lightning_bharat.checkpoints import compressed_file
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import chunk_key
from lightning_bharat.checkpoints.planned import chunks
from lightning_bharat.checkpoints.share import Share


def load_shares(folder: Path, index: Metadata, shares: Mapping[str, Share], check: Callable[[Path], None]) -> None:
    """Fill ``shares`` from ``folder``: a rank reads the parts of files that it needs and no more.

    No communication; names must be in ``index`` with the same shapes (checked by the caller, who can say it in words).
    ``check`` is called with each file before anything is read from it.

    Raises:
        CheckpointError: a file can't be read, or ``check`` raised it.
    """
    reader = _Reader(folder, index, check)
    _without_pickles(dcp.load, dict(shares), storage_reader=reader, planner=_LoadPlanner(), no_dist=True)


def _without_pickles(function: Any, *args: Any, **kwargs: Any) -> None:
    """Call DCP; its exception, which no ``except Exception`` catches, becomes ours."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            function(*args, **kwargs)
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items())
        words = str(first) if isinstance(first, CheckpointError) else f"{type(first).__name__}: {first}"
        raise CheckpointError(words if len(error.failures) == 1 else f"rank {rank}: {words}") from error


class _LoadPlanner(DefaultLoadPlanner):
    """Rectangles of shares as DCP's read items."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for name, share in self.state_dict.items()
                for item in create_read_items_for_chunk_list(
                    name, cast(TensorStorageMetadata, stored[name]), chunks(share)
                )
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)


class _Reader(StorageReader):
    """Parts of tensors out of safetensors files, by the index."""

    def __init__(self, folder: Path, index: Metadata, check: Callable[[Path], None]) -> None:
        self.folder, self.index, self.check = folder, index, check

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.index.storage_data[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            self.check(self.folder / name)
            try:
                self._read_file(self.folder / name, items, planner)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} is damaged: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @torch.no_grad()
    def _read_file(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        if path.name.endswith(compressed_file.SUFFIX):
            for item in items:
                planner.resolve_tensor(item).copy_(self._unpacked(path, item))
            return
        with safe_open(path, framework="pt") as file:
            for item in items:
                name, shape, chunk = self._stored(item)
                key = chunk_key(name, shape, chunk)
                ranges = [slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True)]
                values = file.get_slice(key)[tuple(ranges)] if ranges else file.get_tensor(key)
                planner.resolve_tensor(item).copy_(values)

    def _unpacked(self, path: Path, item: ReadItem) -> Tensor:
        name, _, chunk = self._stored(item)
        dtype = cast(TensorStorageMetadata, self.index.state_dict_metadata[name]).properties.dtype
        place = self.index.storage_data[item.storage_index].place
        return compressed_file.read(path, place, chunk.sizes, dtype, item.storage_offsets, item.lengths)

    def _stored(self, item: ReadItem) -> tuple[str, torch.Size, ChunkStorageMetadata]:
        """Name and shape of a tensor, and the rectangle of it that ``item`` reads from."""
        index = item.storage_index
        stored = cast(TensorStorageMetadata, self.index.state_dict_metadata[index.fqn])
        assert index.index is not None
        return index.fqn, stored.size, stored.chunks[index.index]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
