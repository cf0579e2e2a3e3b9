"""Shares to safetensors files and back, planned by torch.distributed.checkpoint (DCP).

DCP decides which rank writes what (what several ranks hold is written once, balanced by bytes), checks that the
rectangles fill every tensor, and finds which stored rectangles a rank needs. Ours are the two ends: planners that know
:class:`Share`, and storage in safetensors with an index in JSON in place of pickles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lightning_bharat.checkpoints import safetensors_file
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import chunk_key, write_index
from lightning_bharat.checkpoints.share import Share


def save_shares(folder: Path, shares: Mapping[str, Share]) -> dict[str, str]:
    """Write what all ranks hold to ``folder``, with its index. All ranks must call it.

    Returns:
        On rank 0 the digests of all ranks' files, by name.

    Raises:
        CheckpointError: on every rank, where one could not write or the rectangles leave a gap.
    """
    writer = _Writer(folder)
    _without_pickles(dcp.save, dict(shares), storage_writer=writer, planner=_SavePlanner())
    return writer.digests


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


class _SavePlanner(DefaultSavePlanner):
    """Rectangles of shares as DCP's write items."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, share in self.state_dict.items() for item in _write_items(name, share)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)


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
                    name, cast(TensorStorageMetadata, stored[name]), _chunks(share)
                )
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)


def _chunks(share: Share) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(p.offsets), p.local.shape) for p in share.pieces]


def _write_items(name: str, share: Share) -> list[WriteItem]:
    properties = TensorProperties(dtype=share.dtype)
    return [
        WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(share.shape)),
        )
        for chunk in (_chunks(share) if share.writes else [])
    ]


class _Writer(StorageWriter):
    """One safetensors file a rank, then the index by the coordinator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def storage_meta(self) -> StorageMeta | None:
        return None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        entries = [_entry(item, planner) for item in plan.items]
        name, digest = plan.storage_data, ""
        if entries:
            digest = safetensors_file.write(self.folder / name, entries, {"format": "pt"})
        pairs = zip(plan.items, entries, strict=True)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, entry.nbytes, (name, digest)) for item, entry in pairs])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {done.index: done.storage_data for of_rank in results for done in of_rank}
        self.digests = dict(written.values())
        write_index(self.folder, metadata, {index: name for index, (name, _) in written.items()})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _entry(item: WriteItem, planner: SavePlanner) -> safetensors_file.Entry:
    data = item.tensor_data
    assert data is not None
    key = chunk_key(item.index.fqn, data.size, data.chunk)
    read = cast(Any, partial(planner.resolve_data, item))
    return safetensors_file.Entry(key, data.properties.dtype, tuple(data.chunk.sizes), read)


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
            by_file.setdefault(self.index.storage_data[item.storage_index], []).append(item)
        for name, items in by_file.items():
            self.check(self.folder / name)
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    self._read(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @torch.no_grad()
    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        index = item.storage_index
        stored = cast(TensorStorageMetadata, self.index.state_dict_metadata[index.fqn])
        assert index.index is not None
        key = chunk_key(index.fqn, stored.size, stored.chunks[index.index])
        ranges = [slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True)]
        values = file.get_slice(key)[tuple(ranges)] if ranges else file.get_tensor(key)
        planner.resolve_tensor(item).copy_(values)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
