"""Who writes what: planned by torch.distributed.checkpoint (DCP), once for all saves of the same shapes.

DCP decides which rank writes what (what several ranks hold is written once, balanced by bytes) and checks that the
rectangles fill every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import chunk_key
from lightning_bharat.checkpoints.safetensors_file import Entry
from lightning_bharat.checkpoints.share import Share


@dataclass(frozen=True)
class Planned:
    """What a rank writes, and on rank 0 what all write.

    Attributes:
        file: name of this rank's file.
        items: the rectangles that go into it.
        keys: theirs in the file.
        metadata: of all tensors; rank 0 alone has it.
        files: the file of each rectangle; rank 0 alone has them.
        total: bytes of tensors that all ranks write.
    """

    file: str
    items: tuple[WriteItem, ...]
    keys: tuple[str, ...]
    metadata: Metadata | None = None
    files: dict[MetadataIndex, str] = field(default_factory=dict)
    total: int = 0

    def entries(self, shares: Mapping[str, Share]) -> list[Entry]:
        """What this rank writes, as views of the memory of ``shares``."""
        return [_entry(item, key, shares[item.index.fqn]) for item, key in zip(self.items, self.keys, strict=True)]


class Planner:
    """Makes the plan of a save, and keeps it for those that follow."""

    def __init__(self) -> None:
        self._asked: list[tuple] | None = None
        self._made: Planned | None = None

    def known(self, shares: Mapping[str, Share]) -> Planned | None:
        """The plan of the last save, if this rank's ``shares`` are as they were then."""
        return self._made if self._asked is not None and _asked(shares) == self._asked else None

    def plan(self, shares: Mapping[str, Share]) -> Planned:
        """Who writes which rectangles of ``shares``. All ranks must call it, where one of them knows no plan.

        Raises:
            CheckpointError: on every rank, where the rectangles leave a gap.
        """
        self._asked = None
        self._made = _plan([item for name, share in shares.items() for item in _write_items(name, share)])
        self._asked = _asked(shares)
        return self._made


def _asked(shares: Mapping[str, Share]) -> list[tuple]:
    """All that a plan depends on."""
    return [
        (name, share.dtype, share.shape, share.writes, [(piece.offsets, piece.local.shape) for piece in share.pieces])
        for name, share in shares.items()
    ]


def _plan(asked: list[WriteItem]) -> Planned:
    local = SavePlan(asked)
    if not dist.is_initialized():
        return _for_all([local])[0]
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    everyone: list[Any] | None = [None] * ranks if first else None
    dist.gather_object(local, everyone)
    made: list[Any] = [None] * ranks
    if everyone is not None:
        try:
            made = list(_for_all(everyone))
        except Exception as error:
            made = [f"{type(error).__name__}: {error}"] * ranks
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, made if first else None)
    if isinstance(mine[0], str):
        raise CheckpointError(mine[0])
    return mine[0]


def _for_all(plans: Sequence[SavePlan]) -> list[Planned]:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    made, metadata = planner.create_global_plan(list(plans))
    names = [f"rank_{rank:05d}.safetensors" for rank in range(len(made))]
    files = {item.index: name for name, plan in zip(names, made, strict=True) for item in plan.items}
    total = sum(_nbytes(item) for plan in made for item in plan.items)
    first = Planned(names[0], tuple(made[0].items), _keys(made[0]), metadata, files, total)
    rest = zip(names[1:], made[1:], strict=True)
    return [first, *(Planned(name, tuple(plan.items), _keys(plan), total=total) for name, plan in rest)]


def _keys(plan: SavePlan) -> tuple[str, ...]:
    return tuple(chunk_key(item.index.fqn, item.tensor_data.size, item.tensor_data.chunk) for item in plan.items)  # type: ignore[union-attr]


def chunks(share: Share) -> list[ChunkStorageMetadata]:
    """The rectangles of ``share`` in torch's words."""
    return [ChunkStorageMetadata(torch.Size(p.offsets), p.local.shape) for p in share.pieces]


def _write_items(name: str, share: Share) -> list[WriteItem]:
    properties = TensorProperties(dtype=share.dtype)
    return [
        WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(share.shape)),
        )
        for chunk in (chunks(share) if share.writes else [])
    ]


def _entry(item: WriteItem, key: str, share: Share) -> Entry:
    data = item.tensor_data
    assert data is not None
    return Entry(
        key, data.properties.dtype, tuple(data.chunk.sizes), partial(share.at, item.index.offset), share.frozen
    )


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
