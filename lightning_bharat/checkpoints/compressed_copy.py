"""A copy of a checkpoint in fewer bytes: each file of tensors is written anew by :mod:`compressed_file`, and what
speaks of the files, the index and the manifest, with it. What the checkpoint is stays as it was, its id too."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from lightning_bharat.checkpoints import compressed_file
from lightning_bharat.checkpoints.digest import DIGEST
from lightning_bharat.checkpoints.directory import sync
from lightning_bharat.checkpoints.document import STATE
from lightning_bharat.checkpoints.index import Stored, chunk_key, write_index
from lightning_bharat.checkpoints.safetensors_file import Entry
from lightning_bharat.checkpoints.stored import Checkpoint


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a tensor."""

    name: str
    tensor: TensorStorageMetadata
    chunk: ChunkStorageMetadata

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.chunk.offsets)

    @property
    def key(self) -> str:
        return chunk_key(self.name, self.tensor.size, self.chunk)


def write_compressed(checkpoint: Path, folder: Path) -> None:
    """Write the directory ``checkpoint`` to ``folder``, compressed, a tensor at a time, and bring its files to disk.
    What is compressed already is copied. Each file is compared with its digest before it is read.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    found = Checkpoint(checkpoint)
    written: dict[str, dict[str, Any]] = {}
    places: dict[MetadataIndex, Stored] = {}
    for file, chunks in _by_file(found.index).items():
        found.check(checkpoint / file)
        if file.endswith(compressed_file.SUFFIX):
            _copy(checkpoint / file, folder)
            places |= {chunk.index: found.index.storage_data[chunk.index] for chunk in chunks}
            continue
        target = folder / Path(file).with_suffix(compressed_file.SUFFIX).name
        with safe_open(checkpoint / file, framework="pt") as source:
            entries = [
                Entry(one.key, one.tensor.properties.dtype, tuple(one.chunk.sizes), partial(source.get_tensor, one.key))
                for one in chunks
            ]
            digest, put = compressed_file.write(target, entries)
        written[target.name] = {"bytes": target.stat().st_size, DIGEST: digest}
        places |= {one.index: Stored(target.name, put[one.key]) for one in chunks}
    write_index(folder, found.index, places)
    found.check(checkpoint / STATE)
    _copy(checkpoint / STATE, folder)
    found.manifest.write(folder, written)


def _by_file(index: Metadata) -> dict[str, list[_Chunk]]:
    found = defaultdict(list)
    for name, tensor in index.state_dict_metadata.items():
        tensor = cast(TensorStorageMetadata, tensor)
        for chunk in tensor.chunks:
            one = _Chunk(name, tensor, chunk)
            found[index.storage_data[one.index].file].append(one)
    return found


def _copy(file: Path, folder: Path) -> None:
    shutil.copyfile(file, folder / file.name)
    sync(folder / file.name)
