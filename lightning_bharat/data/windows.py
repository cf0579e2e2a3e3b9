"""Packed tokens as one long stream, and windows of it as batches."""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bharat.data.errors import DataError

IGNORED = -100  # a label that no loss counts: torch's cross_entropy leaves it out


class TokenStream:
    """All tokens of a folder of litdata chunks, one after another, mapped from disk.

    The chunks are litdata's own (written for its ``TokensLoader``, and readable by it). They are read here, because
    ``TokensLoader`` drops the end of every chunk and the label of every window's first token, and takes four times as
    long for a window (`benchmarks` in ``tests/data``). A window may lie across chunks.

    Args:
        folder: with ``index.json`` and the chunks.
        dtype: of a token on disk.

    Raises:
        DataError: the index is missing or damaged, or a chunk is missing or has another size.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._dtype = np.dtype(dtype)
        self._files = [self._chunk(folder, chunk) for chunk in _read_index(folder)]
        self._starts = [0, *accumulate(tokens for _, _, tokens in self._files)]
        self._maps: dict[int, np.memmap] = {}

    def _chunk(self, folder: Path, chunk: dict[str, Any]) -> tuple[Path, int, int]:
        try:
            name, items, tokens, size = (chunk[key] for key in ("filename", "chunk_size", "dim", "chunk_bytes"))
            header = 4 * (items + 2)  # uint32: the number of items, and where each begins and the last ends
            sound = Path(name).name == name and header + tokens * self._dtype.itemsize == size
        except (KeyError, TypeError) as error:
            raise _damaged(folder / "index.json", f"a chunk's entry lacks or garbles {error}") from error
        if not sound:
            raise _damaged(folder / "index.json", f"the sizes of {name!r} contradict each other")
        file = folder / name
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if file.stat().st_size != size:
            raise _damaged(file, f"it has {file.stat().st_size} bytes instead of {size}")
        return file, header, tokens

    def __len__(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens ``start`` … ``stop - 1``: shape (stop - start,)."""
        parts = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, behind = self._starts[number], self._starts[number + 1]
            parts.append(self._map(number)[start - first : min(stop, behind) - first])
            start, number = min(stop, behind), number + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def documents(self) -> np.ndarray:
        """Where each document begins, and the last ends: int64, one more than documents.

        Raises:
            DataError: a chunk's header is damaged.
        """
        borders = [np.zeros(1, dtype=np.int64)]
        for start, (file, header, tokens) in zip(self._starts, self._files, strict=False):
            said = np.fromfile(file, dtype=np.uint32, count=header // 4).astype(np.int64)
            places, rest = np.divmod(said[1:] - header, self._dtype.itemsize)
            if (
                said[0] != len(places) - 1
                or rest.any()
                or (np.diff(places) < 0).any()
                or [*places[[0, -1]]] != [0, tokens]
            ):
                raise _damaged(file, "its header does not say where documents begin")
            borders.append(start + places[1:])
        return np.concatenate(borders)

    def files(self) -> np.ndarray:
        """Tokens of each file."""
        return np.diff(self._starts)

    def _map(self, number: int) -> np.memmap:
        if number not in self._maps:
            file, header, tokens = self._files[number]
            self._maps[number] = np.memmap(file, self._dtype, mode="r", offset=header, shape=(tokens,))
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files itself


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` tokens and their next tokens.

    Window ``i`` reads the tokens ``i·length`` … ``(i + 1)·length``: windows meet but do not overlap, and every token
    but the first is a label once. Less than one window at the end is left out.

    ``dataset[i]`` gives ``{"input_ids": (T,), "labels": (T,)}`` and ``dataset.__getitems__([i, ...])`` a batch with
    shapes (B, T), int64; ``labels[t]`` is the token behind ``input_ids[t]``.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        if length < 1:
            raise DataError(f"sequence_length={length}: write a whole number from 1 up")
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.length

    def files(self) -> np.ndarray:
        """Windows that begin in each file; a file's last one may read a few tokens of the next."""
        begun = -(-np.cumsum(self.stream.files()) // self.length)
        return np.diff(np.minimum(begun, len(self)), prepend=0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        starts = [index * self.length for index in indices]
        rows = np.stack([self.stream.read(start, start + self.length + 1) for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _read_index(folder: Path) -> list[dict[str, Any]]:
    file = folder / "index.json"
    try:
        chunks = json.loads(file.read_text())["chunks"]
    except FileNotFoundError as error:
        raise _damaged(file, "it is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, "it is not an index of litdata") from error
    if not isinstance(chunks, list):
        raise _damaged(file, "it is not an index of litdata")
    return chunks


def _damaged(file: Path, how: str) -> DataError:
    return DataError(f"{file} is damaged: {how}. Remove {file.parent.parent} and prepare the data again")
