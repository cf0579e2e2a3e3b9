"""What one rank holds of a tensor: rectangles of the whole, and the memory behind each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_bharat.plan.shards import Piece, TensorSlice, pieces, shape_of_whole

MOST_KNOWN = 4096
_offsets: dict[tuple, tuple[int, ...]] = {}  # of a tensor that is so placed; torch takes a while to tell them


@dataclass(frozen=True, eq=False)
class Share:
    """A rank's part of one whole tensor.

    Attributes:
        shape: shape of the whole tensor.
        dtype: its type.
        pieces: the rectangles that this rank holds, as views of its memory; they do not overlap. Ranks that hold the
            same rectangle hold the same values: a checkpoint stores it once.
        writes: ``False`` where another rank's values are the ones to store (buffers that differ by rank, as running
            statistics do: those of the first rank count, as under Lightning's DDP).
        frozen: whether nothing trains it, so that the next checkpoint may have the same values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    writes: bool = True
    frozen: bool = False

    @classmethod
    def of(cls, tensor: Tensor, cut: TensorSlice | None = None, writes: bool = True, frozen: bool = False) -> Share:
        """The share that ``tensor`` is: a plain tensor or any ``DTensor``, cut over tensor ranks or not.

        Raises:
            ValueError: ``tensor`` is cut over tensor ranks and sharded over data in another way than FSDP2's.
        """
        shape = shape_of_whole(tensor, cut)
        if prod(shape) == 0:
            found = [Piece((0,) * len(shape), tensor.new_empty(shape) if cut else _local(tensor))]
        elif cut is None and isinstance(tensor, DTensor):
            found = _of_dtensor(tensor)
        else:
            found = pieces(tensor, cut)
        return cls(shape, tensor.dtype, tuple(found), writes, frozen)

    @classmethod
    def nothing(cls, tensor: Tensor, cut: TensorSlice | None = None) -> Share:
        """The share of a rank that holds nothing of ``tensor``: another pipeline stage does."""
        return cls(shape_of_whole(tensor, cut), tensor.dtype, ())

    def at(self, offsets: Sequence[int] | None) -> Tensor:
        """The memory of the rectangle that begins at ``offsets``."""
        where = tuple(offsets or ())
        return next(piece.local for piece in self.pieces if piece.offsets == where)

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Copy this rank's rectangles out of ``whole``, touching nothing else of it."""
        for piece in self.pieces:
            index = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.local.shape, strict=True))
            piece.local.copy_(whole[index] if index else whole)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _of_dtensor(tensor: DTensor) -> list[Piece]:
    """Rectangles of a ``DTensor`` with any placements, as it tells them itself to torch's distributed checkpoints."""
    local = _local(tensor)
    if not local.numel():
        return []
    mesh = tensor.device_mesh
    where = (mesh, tuple(mesh.get_coordinate() or ()), tensor.placements, tensor.shape)
    if where not in _offsets:
        if len(_offsets) >= MOST_KNOWN:
            _offsets.clear()
        (chunk,) = tensor.__create_chunk_list__()
        _offsets[where] = tuple(chunk.offsets)
    return [Piece(_offsets[where], local)]
