"""`tensors.json`: which file holds which rectangle of which tensor.

It stands for the pickled ``.metadata`` of torch's distributed checkpoints, so that opening a checkpoint runs no code
of its author. What is read from it is checked before use: it may have been written by anyone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_bharat.checkpoints import compressed_file
from lightning_bharat.checkpoints.compressed_file import SUFFIX, Place
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.safetensors_file import DTYPES, dtype_name

INDEX = "tensors.json"


def chunk_key(name: str, shape: torch.Size, chunk: ChunkStorageMetadata) -> str:
    """Key in the file of a rectangle of tensor ``name``: the name where it is the whole, else with its ranges.

    >>> chunk_key("w", torch.Size([4, 2]), ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 2])))
    'w[2:4, 0:2]'
    """
    if chunk.sizes == shape:
        return name
    ranges = (f"{start}:{start + size}" for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"{name}[{', '.join(ranges)}]"


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` and bring it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """What the JSON file ``path`` says.

    Raises:
        CheckpointError: it isn't there, or isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.exists():
            raise CheckpointError(f"there is no {path.parent}; {_beside(path.parent)}") from None
        raise CheckpointError(f"{path} is missing: {path.parent} is no checkpoint, or an incomplete copy") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it can't be read as JSON ({error})") from None
    except OSError as error:  # a directory in its place, for instance
        raise CheckpointError(f"{path} can't be read: {error}") from None


def _beside(path: Path) -> str:
    """What there is instead of ``path``."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    found = sorted(
        file.name for file in folder.glob("*") if file.suffix == ".ckpt" or (file / "MANIFEST.json").is_file()
    )
    return f"in {folder} are {', '.join(found[:8])}" if found else f"{folder} has no checkpoint"


@dataclass(frozen=True)
class Stored:
    """Where a rectangle was written.

    Attributes:
        file: its name: safetensors, under :func:`chunk_key`, or compressed.
        place: in a compressed file.
    """

    file: str
    place: Place | None = None


def write_index(folder: Path, metadata: Metadata, files: Mapping[MetadataIndex, Stored]) -> None:
    """Write the index of what ``metadata`` lists; ``files`` says where each rectangle was written."""
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        tensors[name] = {
            "dtype": dtype_name(stored.properties.dtype, name),
            "shape": list(stored.size),
            "chunks": [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    **_described(files[MetadataIndex(name, chunk.offsets)]),
                }
                for chunk in stored.chunks
            ],
        }
    write_json(folder / INDEX, {"tensors": tensors})


def _described(stored: Stored) -> dict[str, Any]:
    if stored.place is None:
        return {"file": stored.file}
    return {"file": stored.file, "begin": stored.place.begin, "pieces": list(stored.place.pieces)}


def read_index(folder: Path) -> Metadata:
    """The index as torch's planners want it; ``storage_data`` maps each rectangle to where it is :class:`Stored`.

    Raises:
        CheckpointError: it is missing, damaged, or says what can't be (a rectangle outside its tensor, a gap, a file
            elsewhere).
    """
    path = folder / INDEX
    content = read_json(path)
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, Stored] = {}
    try:
        for name, entry in content["tensors"].items():
            tensors[name] = stored = TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[entry["dtype"]]),
                _sizes(entry["shape"]),
                [ChunkStorageMetadata(_sizes(c["offsets"]), _sizes(c["sizes"])) for c in entry["chunks"]],
            )
            _check_chunks(stored)
            for chunk, said in zip(stored.chunks, entry["chunks"], strict=True):
                nbytes = prod(chunk.sizes) * stored.properties.dtype.itemsize
                files[MetadataIndex(name, chunk.offsets)] = _stored(said, nbytes)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return Metadata(tensors, storage_data=files)


def _sizes(numbers: Any) -> torch.Size:
    if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{numbers!r} is not a list of sizes")
    return torch.Size(numbers)


def _stored(said: dict[str, Any], nbytes: int) -> Stored:
    name = said["file"]
    if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith((".safetensors", SUFFIX)):
        raise ValueError(f"{name!r} is not the name of a safetensors or {SUFFIX} file in this directory")
    if not name.endswith(SUFFIX):
        return Stored(name)
    place = Place(_sizes([said["begin"]])[0], tuple(_sizes(said["pieces"])))
    if len(place.pieces) != -(-nbytes // compressed_file.PIECE):
        raise ValueError(f"{len(place.pieces)} pieces can't hold {nbytes} bytes")
    return Stored(name, place)


def _check_chunks(stored: TensorStorageMetadata) -> None:
    for chunk in stored.chunks:
        ends = [o + n for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(stored.size) or any(e > n for e, n in zip(ends, stored.size, strict=True)):
            raise ValueError(f"rectangle {chunk} lies outside of shape {list(stored.size)}")
    if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
        raise ValueError(f"rectangles {stored.chunks} do not fill shape {list(stored.size)}")
