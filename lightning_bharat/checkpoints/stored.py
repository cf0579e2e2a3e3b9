"""A checkpoint that lies on disk: opened without reading its tensors, which are read where they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_bharat.checkpoints import host_memory
from lightning_bharat.checkpoints.dcp import load_shares
from lightning_bharat.checkpoints.document import STATE, put_back, read_state
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import INDEX, read_index
from lightning_bharat.checkpoints.manifest import MANIFEST, Manifest
from lightning_bharat.checkpoints.saving import Compression, Saver
from lightning_bharat.checkpoints.share import Share


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a checkpoint that hasn't been read. It stands in Lightning's dict where the tensor would."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    checkpoint: Checkpoint | None

    def read(self) -> Tensor:
        """The whole tensor, in host memory.

        Raises:
            CheckpointError: it can't be read, or is larger than the memory.
        """
        try:
            whole = torch.empty(self.shape, dtype=self.dtype)
        except RuntimeError as error:
            raise CheckpointError(f"{self.name} {list(self.shape)} does not fit into host memory: {error}") from None
        load_into([(Share.of(whole), self)])
        return whole


class Checkpoint:
    """A checkpoint directory, opened.

    Raises:
        CheckpointError: it isn't one, is damaged, or an incomplete copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._checked: set[Path] = set()

    @cached_property
    def index(self) -> Metadata:
        """What tensors there are and where; read when first needed."""
        self.check(self.folder / INDEX)
        index = read_index(self.folder)
        self._check_sizes(index)
        return index

    def _check_sizes(self, index: Metadata) -> None:
        """Refuse tensors that can't be in their files, before memory is asked for."""
        needed: dict[str, int] = {}
        for name, entry in index.state_dict_metadata.items():
            entry = cast(TensorStorageMetadata, entry)
            for chunk in entry.chunks:
                stored = index.storage_data[MetadataIndex(name, chunk.offsets)]
                size = chunk.sizes.numel() * entry.properties.dtype.itemsize
                needed[stored.file] = needed.get(stored.file, 0) + (sum(stored.place.pieces) if stored.place else size)
        for name, size in needed.items():
            there = self.manifest.files.get(name, {}).get("bytes")
            if there is not None and size > there:
                raise CheckpointError(f"{self.folder / INDEX} is damaged: {name} of {there} bytes can't hold {size}")

    def check(self, path: Path) -> None:
        """Compare the bytes of a file with what was written, the first time.

        Raises:
            CheckpointError: it is damaged.
        """
        if path not in self._checked:
            host_memory.fetch(path)
            self.manifest.check_file(path)
            self._checked.add(path)

    def look(self) -> None:
        """See that all files are there with the right sizes.

        Raises:
            CheckpointError: names one that isn't.
        """
        self.manifest.check_files(self.folder)

    def names(self) -> list[str]:
        """Of all that lies in it."""
        return sorted(path.name for path in self.folder.iterdir())

    def load(self) -> dict[str, Any]:
        """Lightning's dict, with a :class:`StoredTensor` for each tensor that is stored in shares."""
        self.check(self.folder / STATE)
        return put_back(read_state(self.folder), self.stored)

    def stored(self, name: str) -> StoredTensor:
        """The stored tensor ``name``."""
        entry = self.index.state_dict_metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder} is damaged: it names tensor {name!r}, which its index does not have")
        entry = cast(TensorStorageMetadata, entry)
        return StoredTensor(name, entry.size, entry.properties.dtype, self)

    def try_all(self) -> None:
        """Read everything once, a tensor at a time, and keep nothing.

        Raises:
            CheckpointError: something can't be read.
        """
        self.load()
        for name in self.index.state_dict_metadata:
            self.stored(name).read()


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint directory of ours."""
    return (path / MANIFEST).is_file()


def save(path: Path, checkpoint: dict[str, Any], manifest: Manifest, compression: Compression | None = None) -> None:
    """Write Lightning's dict to the directory ``path``, which appears when it is whole. All ranks must call it.

    Shares and DTensors anywhere in ``checkpoint`` are written by the ranks that hold them; the rest is rank 0's.

    Args:
        compression: ``"zstd"`` writes fewer bytes, without loss (:mod:`~lightning_bharat.checkpoints.compressed_file`).

    Raises:
        CheckpointError: on every rank, with the first reason; ``path`` is then as it was before.
    """
    Saver(compression).save(path, checkpoint, manifest)


def load_into(targets: Iterable[tuple[Share, StoredTensor | Tensor]]) -> None:
    """Fill shares from stored tensors (a rank reads its parts alone) or from whole tensors.

    No communication. Shapes must agree.

    Raises:
        CheckpointError: a file can't be read, or a shape differs.
    """
    rounds: list[tuple[Checkpoint, dict[str, Share]]] = []
    for share, value in targets:
        if tuple(value.shape) != share.shape:
            raise CheckpointError(f"a tensor of shape {list(value.shape)} can't be loaded into {list(share.shape)}")
        if isinstance(value, Tensor) or value.checkpoint is None:
            share.fill(value if isinstance(value, Tensor) else value.read())
            continue
        # One stored tensor may go to several places (weights that are no longer tied): these take a round each.
        free = next((r for c, r in rounds if c is value.checkpoint and value.name not in r), None)
        if free is None:
            rounds.append((value.checkpoint, free := {}))
        free[value.name] = share
    for checkpoint, shares in rounds:
        load_shares(checkpoint.folder, checkpoint.index, shares, checkpoint.check)
