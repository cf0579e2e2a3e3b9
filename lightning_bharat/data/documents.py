"""Documents one by one, as padded batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.lengths import padded
from lightning_bharat.data.windows import IGNORED, TokenStream


class TokenDocuments(Dataset[dict[str, Tensor]]):
    """Documents and their next tokens; those longer than ``length`` are cut into pieces of it.

    No sample holds tokens of two documents, and every token of a document but its first is a label once.
    ``dataset.__getitems__([i, ...])`` gives ``{"input_ids": (B, T), "labels": (B, T)}``, int64, where T is the longest
    of these samples rounded up to a multiple of 8. Behind the end of a sample stand end-of-text tokens as inputs, and
    ``IGNORED`` as labels.

    Args:
        stream: the documents' tokens.
        length: tokens of a sample at most.
        end_of_text: the token to pad with.

    Attributes:
        lengths: of each sample: int64.
    """

    def __init__(self, stream: TokenStream, length: int, end_of_text: int) -> None:
        if length < 1:
            raise DataError(f"sequence_length={length}: write a whole number from 1 up")
        self.stream = stream
        self._end_of_text = end_of_text
        borders = stream.documents()
        labels = np.diff(borders) - 1
        pieces = -(-labels // length)
        piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = np.repeat(borders[:-1], pieces) + piece * length
        self.lengths = np.minimum(length, np.repeat(labels, pieces) - piece * length)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        shape = len(indices), int(padded(self.lengths[indices].max()))
        inputs, labels = np.full(shape, self._end_of_text, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            start, length = int(self._starts[index]), int(self.lengths[index])
            tokens = self.stream.read(start, start + length + 1)
            inputs[row, :length], labels[row, :length] = tokens[:-1], tokens[1:]
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
