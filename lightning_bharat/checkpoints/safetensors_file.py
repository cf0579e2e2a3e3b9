"""Write a safetensors file tensor by tensor, so that one tensor at a time is in host memory.

The library's own writer wants all tensors of a file at once. Format: https://huggingface.co/docs/safetensors (eight
bytes with the header's length, a JSON header with each tensor's type, shape and place, then the tensors one after
another). Files are read with the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bharat.checkpoints.digest import new_digest
from lightning_bharat.checkpoints.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its key in the file, type and shape now, its values when its turn comes; whether it is
    expected to stay as it is."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    frozen: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype, of: str) -> str:
    """The format's name of ``dtype``.

    Raises:
        CheckpointError: the format has none; ``of`` names the tensor.
    """
    if dtype not in NAMES:
        raise CheckpointError(f"{of!r} has dtype {dtype}, which safetensors files can't hold; store it as another type")
    return NAMES[dtype]


def write(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> str:
    """Write ``entries`` to ``path`` and bring the file to disk (fsync). Returns the file's digest.

    Raises:
        CheckpointError: a type that the format lacks, or a tensor that isn't of the shape it was announced with.
    """
    digest = new_digest()
    with path.open("wb") as file:
        for part in _parts(entries, metadata):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> str:
    """Of the file that :func:`write` would write.

    Raises:
        CheckpointError: as there.
    """
    found = new_digest()
    for part in _parts(entries, metadata):
        found.update(part)
    return found.hexdigest()


def _parts(entries: Sequence[Entry], metadata: dict[str, str] | None) -> Iterator[Any]:
    """The bytes of a file, one after another."""
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        name = dtype_name(entry.dtype, entry.key)
        header[entry.key] = {"dtype": name, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from map(as_bytes, entries)


def as_bytes(entry: Entry) -> Any:
    """The values of ``entry`` as an array of bytes.

    Raises:
        CheckpointError: they are of another type or shape than announced.
    """
    tensor = entry.read().detach()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"{entry.key!r} was announced as {entry.dtype} {list(entry.shape)} and is {tensor.dtype} "
            f"{list(tensor.shape)}: it changed while the checkpoint was written"
        )
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
