"""Tensors of a rank in a file without loss in fewer bytes: pieces by zstd, in which bytes of one meaning lie together.

Of floating-point numbers the bytes with sign and exponent are alike and those of the mantissa are not; taken apart
(Blosc's "shuffle"), they compress by what can be had: 13 to 17 % of fp32 weights and Adam states, a quarter of bf16
weights (benchmarks/compression.py). Level 1: higher ones take many times longer for 2 % more. Pieces are read each by
itself, so that a rank reads what it needs. zstd's reader is given what length to expect: a piece that would unpack to
another one is refused. (Blosc's own reader writes past the end of what it is given when the piece says so, which a
stranger's may.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import zstandard
from torch import Tensor

from lightning_bharat.checkpoints.digest import new_digest
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.safetensors_file import Entry, as_bytes

SUFFIX = ".zst"
PIECE = 2**24  # bytes of a tensor that are compressed together
LEVEL = 1
_WINDOW = 2**24  # bytes that a reader keeps at most


@dataclass(frozen=True)
class Place:
    """Where a rectangle lies in a file: pieces of so many bytes, one after another from ``begin`` on."""

    begin: int
    pieces: tuple[int, ...]


def write(path: Path, entries: Sequence[Entry]) -> tuple[str, dict[str, Place]]:
    """Write ``entries`` to ``path``, a piece at a time, and bring the file to disk (fsync).

    Returns:
        The file's digest, and the place of each entry by its key.

    Raises:
        CheckpointError: a tensor that isn't of the shape it was announced with.
    """
    digest, places, end = new_digest(), {}, 0
    with path.open("wb") as file:
        for entry in entries:
            begin, sizes = end, []
            for packed in _packed(as_bytes(entry), entry.dtype.itemsize):
                digest.update(packed)
                file.write(packed)
                sizes.append(len(packed))
                end += len(packed)
            places[entry.key] = Place(begin, tuple(sizes))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), places


def _packed(content: np.ndarray, itemsize: int) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    for begin in range(0, len(content), PIECE):
        piece = content[begin : begin + PIECE]
        yield compressor.compress(np.ascontiguousarray(piece.reshape(-1, itemsize).T).data)


def read(
    path: Path, place: Place, shape: Sequence[int], dtype: torch.dtype, starts: Sequence[int], lengths: Sequence[int]
) -> Tensor:
    """The part of a rectangle that begins at ``starts`` and is ``lengths`` large; other pieces are not read.

    Args:
        shape: of the whole rectangle.

    Raises:
        CheckpointError: a piece is damaged, or would unpack to another length than this type and shape have.
    """
    row = prod(shape[1:]) * dtype.itemsize
    total = prod(shape) * dtype.itemsize
    begin, end = (starts[0] * row, (starts[0] + lengths[0]) * row) if shape else (0, total)
    if end == begin:
        return torch.empty(tuple(lengths), dtype=dtype)
    first, last = begin // PIECE, -(-end // PIECE)
    with path.open("rb") as file:
        file.seek(place.begin + sum(place.pieces[:first]))
        unpacked = [
            _unpacked(file, place.pieces[i], min(PIECE, total - i * PIECE), dtype.itemsize, path)
            for i in range(first, last)
        ]
    content = unpacked[0] if len(unpacked) == 1 else np.concatenate(unpacked)
    values = torch.from_numpy(content[begin - first * PIECE : end - first * PIECE]).view(dtype)
    if not shape:
        return values.view(())
    inner = tuple(slice(o, o + n) for o, n in zip(starts[1:], lengths[1:], strict=True))
    return values.view(lengths[0], *shape[1:])[(slice(None), *inner)]


def _unpacked(file: BinaryIO, size: int, expected: int, itemsize: int, path: Path) -> np.ndarray:
    packed = file.read(size)
    try:
        said: Any = zstandard.get_frame_parameters(packed).content_size if len(packed) == size else "fewer"
        if said != expected:
            raise CheckpointError(f"{path} is damaged: a piece has {said} bytes in it, and {expected} are expected")
        content = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompress(packed, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return np.frombuffer(content, np.uint8).reshape(itemsize, -1).T.copy("C").reshape(-1)
