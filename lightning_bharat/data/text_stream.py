"""Text files to batches of tokens while training goes on: read, tokenize, pack, augment, batch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_bharat.data.errors import DataError
from lightning_bharat.data.order import GlobalOrder
from lightning_bharat.data.stages import Clock, Stages
from lightning_bharat.data.text_documents import Documents
from lightning_bharat.data.tokenizer import Encoder

DOCUMENTS = 16  # read and tokenized at a time
BLOCK_TOKENS = 1 << 18  # whose sequences are shuffled among each other

Sequence = dict[str, Tensor]
Augment = Callable[[Sequence, torch.Generator], Sequence]


@dataclass(frozen=True)
class Place:
    """In the order of an epoch, the same on any number of ranks.

    Attributes:
        position: sequences before it.
        document: number in the epoch's order of the one in which the block of these sequences begins.
        token: of that document, with which it begins.
        ended: it is the end of the epoch.
    """

    epoch: int = 0
    position: int = 0
    document: int = 0
    token: int = 0
    ended: bool = False


class Packed(NamedTuple):
    """A sequence, its number in the epoch, and the place behind it."""

    number: int
    tokens: np.ndarray
    behind: Place


class Block(NamedTuple):
    """Tokens of sequences that are shuffled with each other, and the one behind; where they begin and end: the number
    of a document in the epoch's order, and a token of it."""

    begins: tuple[int, int]
    ends: tuple[int, int]
    tokens: np.ndarray


class Made(NamedTuple):
    """A batch, the place behind it, and seconds that stages have worked so far; or what ended the stream."""

    batch: Sequence | None
    behind: Place
    busy: dict[str, float]
    error: str = ""


class TextStream(IterableDataset[Made]):
    """One data rank's batches of an epoch, from ``place`` on.

    Documents come in an order that depends on seed and epoch alone; their tokens are packed one behind another and cut
    into sequences, which are shuffled in blocks of 262,144 tokens. So each rank knows all sequences, and takes its rows
    of each step: it tokenizes all text, and augments only its own.

    Args:
        documents: to read.
        encoder: tokenizes.
        length: tokens of a sequence.
        batch_size: sequences a step of each data rank.
        num_replicas: data ranks.
        rank: which of them this is.
        augment: see :class:`~lightning_bharat.datamodules.TextDataModule`.
        seed: of the orders and of ``augment``.
        shuffle: documents and sequences.
        drop_last: leave out the rest that does not fill a step.
        threads: that tokenize; 0: stages one after another.

    Attributes:
        place: where the next iteration begins.
    """

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        length: int,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        augment: Augment | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        threads: int = 1,
    ) -> None:
        for name, value in (("sequence_length", length), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"{name}={value}: write a whole number from 1 up")
        self.documents, self._encoder, self._length = documents, encoder, length
        self.batch_size, self._ranks, self._rank = batch_size, num_replicas, rank
        self._augment, self.seed, self.shuffle, self.drop_last = augment, seed, shuffle, drop_last
        self._threads = threads
        self.place = Place()

    @property
    def global_batch(self) -> int:
        """Sequences of a step over all data ranks."""
        return self.batch_size * self._ranks

    def __iter__(self) -> Iterator[Made]:
        if get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of this process take the library's place
        stages = Stages(self._threads)
        place = Place(self.place.epoch + 1) if self.place.ended else self.place
        try:
            for batch, behind in stages.beside("batch", self._batches(stages, place)):
                yield Made(batch, behind, dict(stages.busy))
        except DataError as error:  # as it is, without the traceback of another process
            yield Made(None, place, dict(stages.busy), str(error))

    def _batches(self, stages: Stages, place: Place) -> Iterator[tuple[Sequence, Place]]:
        order = GlobalOrder(len(self.documents), self.seed, self.shuffle)
        starts = range(place.document, len(self.documents), DOCUMENTS)
        numbers = (order(place.epoch, at, min(at + DOCUMENTS, len(self.documents))) for at in starts)
        texts = stages.beside("read", stages.work("read", map(self._read, numbers), lambda: 0.0))
        encoded = Clock(stages.each("tokenize", self._encode, texts))
        blocks = stages.work("pack", _blocks(encoded, self._in_block, self._length, place), lambda: encoded.seconds)
        packed = self._packed(stages.beside("pack", blocks, ahead=1), place)
        for rows, behind in self._steps(packed, place):
            sequences = [stages.timed("augment", self._made, (place.epoch, row)) for row in rows]
            yield stages.timed("batch", _stack, sequences), behind

    def _read(self, numbers: np.ndarray) -> list[str]:
        return [self.documents[number] for number in numbers.tolist()]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        # An empty document has no end.
        return [tokens if text else tokens[:0] for text, tokens in zip(texts, self._encoder(texts), strict=True)]

    @property
    def _in_block(self) -> int:
        """Sequences of a block."""
        return max(1, BLOCK_TOKENS // self._length)

    def _packed(self, blocks: Iterable[Block], place: Place) -> Iterator[Packed]:
        """Every sequence from the beginning of the block of ``place`` on."""
        number = place.position // self._in_block * self._in_block
        for begins, ends, tokens in blocks:
            count = (len(tokens) - 1) // self._length
            draw = (place.epoch + 1 << 32) + number // self._in_block  # another one for each block of each epoch
            order = GlobalOrder(count, self.seed, self.shuffle)(draw, 0, count)
            for i, window in enumerate(order.tolist()):
                document, token = begins if i + 1 < count else ends
                behind = Place(place.epoch, number + i + 1, document, token)
                first = window * self._length
                yield Packed(number + i, tokens[first : first + self._length + 1], behind)
            number += count

    def _steps(self, packed: Iterator[Packed], place: Place) -> Iterator[tuple[list[Packed], Place]]:
        """This rank's rows of each step; one step is held back, to know which is the last."""
        whole: list[Packed] = []
        rows: list[Packed] = []
        for row in packed:
            if row.number < place.position:
                continue
            rows.append(row)
            if len(rows) == self.global_batch:
                if whole:
                    yield self._share(whole), whole[-1].behind
                whole, rows = rows, []
        rest = [] if self.drop_last else rows
        if rest and len(rest) < self._ranks:
            whole, rest = self._lend(whole, rest)
        if not whole and not rest:
            self._refuse(len(rows), place)
            return
        steps = [step for step in (whole, rest) if step]
        for step in steps:
            yield self._share(step), replace(step[-1].behind, ended=step is steps[-1])

    def _lend(self, whole: list[Packed], rest: list[Packed]) -> tuple[list[Packed], list[Packed]]:
        """Rows of the step before go to the last one, so that each rank has one; or both are one step."""
        lent = self._ranks - len(rest)
        if not whole:
            raise DataError(
                f"{len(rest)} sequences of sequence_length={self._length} are fewer than {self._ranks} data ranks; "
                f"run on at most {len(rest)} data ranks, or give more text"
            )
        return (whole[:-lent], whole[-lent:] + rest) if len(whole) - lent >= self._ranks else ([], whole + rest)

    def _refuse(self, left: int, place: Place) -> None:
        if place.position:  # what is left of an epoch may be less than a step of another size
            return
        raise DataError(
            f"the texts {', '.join(map(str, self.documents.files))} are {left} sequences of sequence_length="
            f"{self._length}, fewer than one step of batch_size={self.batch_size} on {self._ranks} data ranks = "
            f"{self.global_batch}; write a smaller batch_size, a shorter sequence_length, or give more text"
        )

    def _share(self, rows: list[Packed]) -> list[Packed]:
        even, more = divmod(len(rows), self._ranks)
        begin = self._rank * even + min(self._rank, more)
        return rows[begin : begin + even + (self._rank < more)]

    def _made(self, row: tuple[int, Packed]) -> Sequence:
        epoch, packed = row
        tokens = torch.from_numpy(packed.tokens.astype(np.int64))
        sequence = {"input_ids": tokens[:-1], "labels": tokens[1:]}
        if self._augment is None:
            return sequence
        seed = xxhash.xxh3_64_intdigest(f"{self.seed} {epoch} {packed.number}".encode()) >> 1
        return self._augment(sequence, torch.Generator().manual_seed(seed))


def _blocks(encoded: Iterable[list[np.ndarray]], in_block: int, length: int, place: Place) -> Iterator[Block]:
    """So many sequences at a time, and at last what are left."""
    size = in_block * length
    held: deque[np.ndarray] = deque()
    document, token, total = place.document, place.token, 0
    for arrays in encoded:
        for array in arrays:
            held.append(array)
            total += len(array)
            while total - token > size:
                tokens = _cut(held, token, size + 1)
                begins, token = (document, token), token + size
                while held and token >= len(held[0]):
                    token, total, document = token - len(held[0]), total - len(held[0]), document + 1
                    held.popleft()
                yield Block(begins, (document, token), tokens)
    rest = (total - token - 1) // length * length
    if rest > 0:
        yield Block((document, token), (document, token), _cut(held, token, rest + 1))


def _cut(held: deque[np.ndarray], start: int, count: int) -> np.ndarray:
    flat = held[0] if len(held) == 1 else np.concatenate(held)
    return flat[start : start + count].copy()


def _stack(sequences: list[Sequence]) -> Sequence:
    return {key: torch.stack([sequence[key] for sequence in sequences]) for key in sequences[0]}
